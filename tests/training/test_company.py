"""Leader and followers of one command: who meets whom, what may be asked for, and with which code they leave."""

from __future__ import annotations

import ast
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from genrec_dist.baselines.sasrec import train_sasrec
from genrec_dist.config import RuntimeConfig
from genrec_dist.errors import ClusterError
from genrec_dist.pipeline import StageContext
from genrec_dist.testing.faults import raise_data_error
from genrec_dist.training import company
from genrec_dist.training.company import FUNCTIONS, Company, function_of, name_of

ROOT = Path(__file__).resolve().parents[2]


def meet(store, size: int = 3) -> list[Company]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: Company((store, rank, size)), range(size)))


def test_all_ranks_of_a_round_have_its_name_and_no_other_round_has():
    store = dist.HashStore()
    first, second = meet(store), meet(store)
    assert len({c.round for c in first}) == 1
    assert len({c.round for c in second}) == 1
    assert first[0].round != second[0].round
    assert (first[0].restarts(), second[0].restarts()) == (1, 1)


def test_followers_leave_with_the_leaders_code():
    store = dist.HashStore()
    meet(store)[0].dismiss(3)
    leader, *followers = meet(store)
    leader.dismiss(75)
    assert [follower.follow() for follower in followers] == [75, 75]


def test_a_rank_that_does_not_come_is_an_error(monkeypatch):
    monkeypatch.setattr(company, "MEET_SECONDS", 0.3)
    with pytest.raises(ClusterError, match="not all ranks"):
        Company((dist.HashStore(), 0, 2))


def test_every_launched_function_of_the_project_has_a_name_that_leads_back_to_it():
    launched = set()
    for file in (ROOT / "genrec_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "launch":
                launched.add(ast.unparse(node.args[0]))
    assert launched == set(FUNCTIONS)
    for name in FUNCTIONS:
        assert name_of(function_of(name)) == name


@pytest.mark.parametrize("name", ["system", "os.system", "raise_data_error", ""])
def test_no_other_function_is_called(name):
    store = dist.HashStore()
    leader, follower = meet(store, 2)
    leader._tell({"do": "run", "function": name, "settings": {}, "context": {}})
    with pytest.raises(ClusterError, match="unknown function"):
        follower.follow()


def test_a_function_under_the_name_of_another_is_refused(tmp_path):
    def imposter(worker, context, settings):
        pass

    imposter.__name__ = train_sasrec.__name__
    for function in (raise_data_error, imposter):
        with pytest.raises(ClusterError, match="several hosts"):
            name_of(function)


def test_a_context_arrives_as_it_was_with_absolute_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sent = StageContext(
        Path("out"), {"catalog": Path("in")}, RuntimeConfig(num_workers=2), "key", "title", Path("run/events.jsonl")
    )
    back = company._unpacked(company._packed(sent))
    assert (back.runtime, back.key, back.title) == (sent.runtime, sent.key, sent.title)
    assert (back.out, back.inputs) == (tmp_path / "out", {"catalog": tmp_path / "in"})
    assert back.events_file == tmp_path / "run" / "events.jsonl"
