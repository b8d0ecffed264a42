"""Sizes and step times of trials that are not built yet, against the real modules."""

from __future__ import annotations

import pytest

from genrec_dist.config import build_config
from genrec_dist.generator.parameters import count_parameters
from genrec_dist.studies.scaling.counts import planned_parameters
from genrec_dist.studies.scaling.probe import TASKS, make_material, seconds_of_step
from genrec_dist.studies.sizes import CodebookSize, Counts, generator_size, gpt_size, hstu_size, sasrec_size
from genrec_dist.training.worker import Worker

ITEMS, CODES, WIDTH = 200, 16, 24
SMALL = {"dim": 16, "num_heads": 2}
SECTIONS = {
    "prorec": "generator",
    "csj_id": "gpt",
    "sasrec": "sasrec",
    "hstu": "hstu",
}


def material():
    book = CodebookSize(1 + CODES + ITEMS, 2, CODES, (CODES, 13))
    made = make_material(Counts(100, ITEMS, 1000), book, CODES, WIDTH)
    return made, CodebookSize(made.trie.num_nodes, 2, CODES, (CODES, 13))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("prorec", {"num_decoder_layers": 3}),
        ("prorec", {"head": "per_level"}),
        ("prorec", {"encoder_input": "codes", "distill_weight": 0, "item_embedding_rate": 0}),
        ("csj_id", {"num_layers": 2}),
        ("csj_id", {"head": "child"}),
        ("sasrec", {"num_layers": 3, "input_norm": True}),
        ("hstu", {"num_layers": 3}),
        ("hstu", {"similarity": "inner"}),
    ],
)
def test_planned_parameters_are_those_of_the_real_modules(method, settings):
    section = SECTIONS[method]
    config = build_config({"method": method, section: SMALL | settings, "identifiers": {"num_clusters": CODES}})
    made, book = material()
    size = {
        "generator": lambda: generator_size(config.generator, book, ITEMS, WIDTH),
        "gpt": lambda: gpt_size(config.gpt, book, WIDTH, 5),
        "sasrec": lambda: sasrec_size(config.sasrec, ITEMS),
        "hstu": lambda: hstu_size(config.hstu, ITEMS),
    }[section]()
    model = TASKS[section](config, made, Worker()).model
    assert planned_parameters(config, section, size, book) == count_parameters(model)


def test_a_step_is_timed_with_the_real_task_and_engine(monkeypatch):
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)  # other tests of this process keep theirs
    config = build_config({"generator": SMALL | {"optim": {"batch_size": 32}}, "runtime": {"device": "cpu"}})
    assert 0 < seconds_of_step(config, "generator", material()[0], 1) < 60
