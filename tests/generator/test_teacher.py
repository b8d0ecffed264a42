"""A generator that learns from Stage I: its probabilities, the codes they make, the losses, and the stage."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError

from genrec_dist.artifacts.embeddings import write_embeddings
from genrec_dist.collaborative.fusion import FusionModel
from genrec_dist.config import Config, FusionConfig, GeneratorConfig
from genrec_dist.errors import ConfigError
from genrec_dist.generator import stage
from genrec_dist.generator.heads import DeviceTrie, code_losses
from genrec_dist.generator.soft_codes import SoftCodes, node_masses, soft_cross_entropy
from genrec_dist.generator.teacher import Teacher
from genrec_dist.methods import build_stages
from genrec_dist.testing.tiny import tiny_embeddings, tiny_generator, tiny_optim, tiny_trie
from genrec_dist.testing.tiny_tasks import generator_task, taught_task
from genrec_dist.training.worker import Worker

NUM_ITEMS = 40
TREES = {
    "uneven": lambda: tiny_trie(NUM_ITEMS, 5, seed=2),
    "even": lambda: tiny_trie(NUM_ITEMS, 4, depth=3),
    "flat": lambda: tiny_trie(NUM_ITEMS, NUM_ITEMS, depth=1),
}
HEADS = ("child", "per_level")


def probabilities(rows: int) -> torch.Tensor:
    """Made-up ones of a teacher."""
    return (3 * torch.randn(rows, NUM_ITEMS, generator=torch.Generator().manual_seed(1))).double().softmax(1)


def below(trie: DeviceTrie, node: int) -> torch.Tensor:
    """Items below a node."""
    if node == 0:
        return torch.arange(trie.num_items)
    return (trie.item_path == node).any(1).nonzero()[:, 0]


@pytest.mark.parametrize("tree", TREES)
def test_masses_and_shares_are_those_of_the_items_below(tree):
    trie, taught = DeviceTrie(TREES[tree]()), probabilities(3)
    soft = SoftCodes(trie, taught, 1.0)
    mass = {0: taught.sum(1)}
    for level, found in enumerate(node_masses(trie, taught), 1):
        for place in range(found.shape[1]):
            node = trie.level_start[level] + place
            mass[node] = taught[:, below(trie, node)].sum(1)
            torch.testing.assert_close(found[:, place], mass[node])
    assert len(mass) == trie.num_nodes
    for node in range(trie.num_nodes):
        level, count = int(trie.level[node]), int(trie.num_children[node])
        if level == trie.max_depth:
            continue
        shares = soft.shares(torch.full((3,), node), level)
        assert shares.shape == (3, trie.widths[level])
        for child in range(trie.widths[level]):
            expected = mass[int(trie.first_child[node]) + child] / mass[node] if child < count else torch.zeros(3)
            torch.testing.assert_close(shares[:, child], expected.to(shares))
    assert not soft.shares(torch.zeros(3, dtype=torch.int64), 0).isnan().any()


def test_a_node_without_probability_teaches_nothing():
    trie = DeviceTrie(TREES["even"]())
    taught = torch.zeros(1, NUM_ITEMS)
    taught[0, 0] = 1
    other = next(int(n) for n in trie.item_path[:, 0] if n != trie.item_path[0, 0])
    assert not SoftCodes(trie, taught, 1.0).shares(torch.tensor([other]), 1).any()


@pytest.mark.parametrize("head", HEADS)
def test_where_a_teacher_says_nothing_the_true_code_is_learned(head):
    target = torch.tensor([5, 9])
    for plain, taught in zip(
        losses_of(head, "even", target, None), losses_of(head, "even", target, torch.zeros(2, 40))
    ):
        torch.testing.assert_close(plain, taught)


def losses_of(head: str, tree: str, target: torch.Tensor, soft: torch.Tensor | None, weight: float = 1.0):
    """Losses of the levels and the gradient of the states, float32."""
    model = tiny_generator(TREES[tree](), head=head)
    trie = model.trie
    hidden = torch.randn(len(target), trie.max_depth, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    codes = None if soft is None else SoftCodes(trie, soft.float(), weight)
    losses = code_losses(model.head, trie, hidden, trie.item_path[target], trie.depth[target], 0.0, None, codes)
    return torch.stack(losses), torch.autograd.grad(torch.stack(losses).sum(), hidden)[0]


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("head", HEADS)
def test_a_teacher_that_knows_the_target_is_the_plain_loss(head, tree):
    target = torch.arange(0, NUM_ITEMS, 3)
    sure = torch.nn.functional.one_hot(target, NUM_ITEMS)
    for plain, taught in zip(losses_of(head, tree, target, None), losses_of(head, tree, target, sure, 0.7)):
        torch.testing.assert_close(plain, taught)


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_is_the_cross_entropy_of_the_children_by_hand(head):
    target, weight = torch.tensor([3, 17, 30]), 0.4
    taught = probabilities(3)
    model = tiny_generator(TREES["uneven"](), head=head)
    trie = model.trie
    hidden = torch.randn(3, trie.max_depth, 8, generator=torch.Generator().manual_seed(2))
    model.requires_grad_(False)
    expected = [0.0] * trie.max_depth
    for row, item in enumerate(target.tolist()):
        node = 0
        for level in range(int(trie.depth[item])):
            child, first = int(trie.item_path[item, level]), int(trie.first_child[node])
            children = range(first, first + int(trie.num_children[node]))
            state = hidden[row : row + 1, level]
            if head == "child":
                log_p = model.head(state, torch.tensor([node]), level)[0].log_softmax(0)
                place = {n: n - first for n in children}
            else:  # over all codes, existing or not
                log_p = model.head.code_logits(state, level)[0].log_softmax(0)
                place = {n: int(trie.code[n]) for n in children}
            mass = {n: float(taught[row, below(trie, n)].sum()) for n in children}
            soft = -sum(mass[n] / sum(mass.values()) * float(log_p[place[n]]) for n in children)
            expected[level] += weight * soft - (1 - weight) * float(log_p[place[child]])
            node = child
    losses, _ = losses_of(head, "uneven", target, taught, weight)
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)


def test_soft_cross_entropy_is_that_of_torch():
    logits, shares = torch.randn(5, 7), torch.randn(5, 7).softmax(1)
    torch.testing.assert_close(
        soft_cross_entropy(logits, shares), torch.nn.functional.cross_entropy(logits, shares, reduction="sum")
    )


@pytest.mark.parametrize("backbone", ["din", "sasrec"])
def test_a_teacher_gives_the_probabilities_that_stage_one_trains(backbone):
    section = FusionConfig(backbone=backbone, dim=6, num_heads=2, max_history=6, temperature=0.2, dropout=0.5)
    torch.manual_seed(0)
    model = FusionModel(section, torch.from_numpy(tiny_embeddings(NUM_ITEMS))).train()
    history = torch.randint(NUM_ITEMS, (4, 6))
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 5])[:, None]
    found = Teacher(model, temperature=2.0)(history, mask)
    expected = (model.score_catalog(history, mask) / 0.2 / 2.0).softmax(1)
    assert not model.training
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(1), torch.ones(4))


def test_a_teacher_can_leave_out_what_stands_in_the_history():
    torch.manual_seed(0)
    section = FusionConfig(backbone="sasrec", dim=6, num_heads=2, max_history=6, temperature=0.2)
    model = FusionModel(section, torch.from_numpy(tiny_embeddings(5)))
    history = torch.tensor([[2, 3, 2, 0, 0], [4, 0, 0, 0, 0], [0, 1, 2, 3, 4]])
    mask = torch.arange(5) < torch.tensor([3, 1, 5])[:, None]  # the last row's history is the whole catalog
    every, found = Teacher(model)(history, mask), Teacher(model, skip_history=True)(history, mask)
    for row, left in enumerate(([0, 1, 4], [0, 1, 2, 3], [])):
        expected = torch.zeros(5)
        expected[left] = every[row, left] / every[row, left].sum()
        torch.testing.assert_close(found[row], expected)


def test_the_teacher_is_no_part_of_the_model():
    taught, plain = taught_task(Worker()), generator_task(Worker())
    assert taught.model.state_dict().keys() == plain.model.state_dict().keys()
    assert [n for n, _ in taught.model.named_parameters()] == [n for n, _ in plain.model.named_parameters()]
    assert not any(p.requires_grad for p in taught.model.teacher.model.parameters())


def test_a_step_learns_from_the_teacher_in_codes_and_token():
    task = taught_task(Worker())
    batch = task.batch(task.order.batch(0), Worker())
    assert all("times" in part for part in batch["parts"])  # Stage I reads them, the generator does not
    with torch.no_grad():
        taught = task.model(batch)
        task.model.teacher = None
        plain = task.model(batch)
    for name in ("loss_gen", "loss_distill"):
        assert math.isfinite(taught[name])
        assert abs(taught[name] - plain[name]) > 1e-3


def make(**sections) -> Config:
    return Config.model_validate({"method": "prorec"} | sections)


def test_a_teacher_that_cannot_be_is_refused():
    for sections, said in (
        ({"fusion": {"mode": "semantic"}}, "fusion.mode=semantic"),
        ({"fusion": {"max_history": 10}}, "generator.max_history is 20"),
        ({"runtime": {"shard_tables": True}}, "shard_tables"),
    ):
        with pytest.raises(ValidationError, match=said):
            make(generator={"teacher_weight": 0.5}, **sections)
    make(method="csj_id", generator={"teacher_weight": 0.5}, fusion={"mode": "semantic"})  # has no Stage I to ask


def test_stage_one_s_settings_and_text_belong_to_a_taught_generator():
    def stage(**sections):
        return next(s for s in build_stages(make(**sections)) if s.name == "generator")

    plain, taught = stage(), stage(generator={"teacher_weight": 0.5})
    assert set(taught.inputs) - set(plain.inputs) == {"semantic"}
    assert plain.key != taught.key


def test_the_stage_builds_the_teacher_that_is_configured(monkeypatch, tmp_path):
    write_embeddings(tmp_path, tiny_embeddings(NUM_ITEMS))
    section = FusionConfig(dim=6, num_heads=2, temperature=0.2)
    stage_one = FusionModel(section, torch.from_numpy(tiny_embeddings(NUM_ITEMS)))
    monkeypatch.setattr(stage, "load_fusion", lambda *_: stage_one)
    config = GeneratorConfig(teacher_weight=0.5, teacher_temperature=2.0, teacher_skips_history=True)
    context = SimpleNamespace(inputs={"semantic": tmp_path, "fusion": tmp_path})
    found = stage._teacher(config, context, {"fusion": section.model_dump()}, Worker())
    expected = Teacher(stage_one, temperature=2.0, skip_history=True)
    history, mask = torch.tensor([[3, 7]]), torch.ones(1, 2, dtype=torch.bool)
    torch.testing.assert_close(found(history, mask), expected(history, mask))
    assert not found(history, mask)[0, [3, 7]].any()


def test_a_catalog_too_large_for_a_batch_is_refused(monkeypatch, tmp_path):
    write_embeddings(tmp_path, tiny_embeddings(NUM_ITEMS))
    config = GeneratorConfig(teacher_weight=0.5, optim=tiny_optim(batch_size=11))
    context = SimpleNamespace(inputs={"semantic": tmp_path})
    for backbone, numbers in (("sasrec", 10 * NUM_ITEMS), ("din", 219 * NUM_ITEMS)):  # 20 items of a history
        monkeypatch.setattr(stage, "CATALOG_LOGITS", numbers)
        with pytest.raises(ConfigError, match="too many for a batch"):
            stage._teacher(config, context, {"fusion": {"backbone": backbone}}, Worker())
