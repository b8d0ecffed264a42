"""The decoder-only generator: against a full-sequence attention written out here, in training and in search."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from genrec_dist.generator.beam import beam_search, exact_log_probabilities
from genrec_dist.generator.gpt import GptGenerator
from genrec_dist.identifiers.trie import Trie, build_trie
from genrec_dist.testing.tiny import tiny_gpt, tiny_histories, tiny_sequences, tiny_trie
from genrec_dist.training.tasks import RowBatches
from genrec_dist.training.worker import Worker

torch.set_num_threads(1)
NUM_ITEMS = 14
HEADS = ["per_level", "child"]


@pytest.fixture
def trie() -> Trie:
    made = tiny_trie(NUM_ITEMS, 4, seed=3)
    assert len(set(made.depth)) > 1
    return made


def tokens_of(model: GptGenerator, trie: Trie, items: list[int]) -> torch.Tensor:
    """[BOS, codes of each item], one token after the other, (1 + n L, D)."""
    levels, num_codes = trie.max_depth, int(trie.codes.max()) + 1
    rows = [model.bos]
    for place, item in enumerate(items):
        for level in range(levels):
            code = trie.codes[item, level] if level < trie.depth[item] else num_codes
            token = model.code_in.weight[level * (num_codes + 1) + code] + model.level_in.weight[level]
            rows.append(token + model.position.weight[place])
    return torch.stack(rows)


def naive_states(model: GptGenerator, x: torch.Tensor) -> torch.Tensor:
    """One pass over a whole unpadded sequence, head by head, with the causal mask written out; (T, D)."""
    length, dim = x.shape
    future = torch.ones(length, length).triu(1).bool()
    for layer in model.layers:
        attention, normed = layer.attention, layer.attention_norm(x)
        key, value = (normed @ attention.key_value.weight.T + attention.key_value.bias).split(dim, 1)
        query, heads = attention.query(normed), []
        for part in torch.arange(dim).split(dim // attention.num_heads):
            scores = query[:, part] @ key[:, part].T / math.sqrt(len(part))
            weights = scores.masked_fill(future, -torch.inf).exp()
            heads.append(weights / weights.sum(1, keepdim=True) @ value[:, part])
        x = x + attention.out(torch.cat(heads, 1))
        x = x + layer.ffn(layer.ffn_norm(x))
    return model.norm(x)


def naive_steps(model: GptGenerator, trie: Trie, items: list[int], every_code: bool) -> list[list]:
    """For each item and each of its levels: log-probabilities of the classes, and the class of the right code."""
    states, out = naive_states(model, tokens_of(model, trie, items)), []
    for place, item in enumerate(items):
        steps = []
        for level in range(trie.depth[item]):
            state, prefix = states[place * trie.max_depth + level], trie.codes[item, :level]
            below = np.flatnonzero((trie.codes[:, :level] == prefix).all(1) & (trie.depth > level))
            codes = sorted(set(trie.codes[below, level].tolist()))
            if model.config.head == "per_level":
                logits = model.head.levels[level](state)
                classes = list(range(len(logits))) if every_code else codes
                logits = logits[classes]
            else:
                classes = codes
                nodes = [trie.item_path[below[trie.codes[below, level] == code][0], level] for code in codes]
                logits = F.cosine_similarity(model.head.query(state)[None], model.head.nodes.weight[nodes])
                logits = logits / model.config.head_temperature
            steps.append(((logits.exp() / logits.exp().sum()).log(), classes.index(trie.codes[item, level])))
        out.append(steps)
    return out


def windows(num_rows: int, width: int, seed: int = 0) -> dict:
    """A batch of windows of different lengths with garbage where it is padded."""
    items = torch.from_numpy(np.random.default_rng(seed).integers(0, NUM_ITEMS, (num_rows, width + 1)))
    _, mask = tiny_histories(num_rows, NUM_ITEMS, width, seed=seed)
    return {"history": items[:, :-1], "targets": items[:, 1:], "mask": mask, "count": float(mask.sum())}


def unpadded(batch: dict) -> list[list[int]]:
    rows = zip(batch["history"], batch["targets"], batch["mask"])
    return [[int(history[0]), *targets[keep].tolist()] for history, targets, keep in rows]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@torch.no_grad()
def test_loss_and_its_levels_against_the_naive_pass(trie, head, smoothing):
    model, batch = tiny_gpt(trie, head=head, label_smoothing=smoothing), windows(4, 5)
    levels = torch.zeros(trie.max_depth)
    for row in unpadded(batch):
        for steps in naive_steps(model, trie, row, every_code=True):
            for level, (log_p, right) in enumerate(steps):
                levels[level] -= (1 - smoothing) * log_p[right] + smoothing * log_p.mean()
    losses = model(batch)
    got = torch.stack([losses[f"loss_level_{level}"] for level in range(1, trie.max_depth + 1)])
    torch.testing.assert_close(got, levels / batch["count"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses["loss"], got.sum())
    assert len(losses) == 1 + trie.max_depth


@torch.no_grad()
def test_states_against_the_naive_pass(trie):
    model = tiny_gpt(trie)
    items = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
    for row, states in zip(items.tolist(), model.states(items)):
        expected = naive_states(model, tokens_of(model, trie, row))[:-1]
        torch.testing.assert_close(states.flatten(0, 1), expected, atol=1e-5, rtol=1e-5)


def chains() -> Trie:
    """No choice at levels 1 and 3."""
    codes = np.array([(0, item // 2, 0, item % 2) for item in range(NUM_ITEMS)], np.int32)
    return build_trie(codes, np.full(NUM_ITEMS, 4, np.int32))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tree", ["uneven", "chains"])
@torch.no_grad()
def test_exact_scorer_and_beam_against_the_naive_pass(trie, tree, head):
    trie = chains() if tree == "chains" else trie
    model = tiny_gpt(trie, head=head)
    history, mask = tiny_histories(4, NUM_ITEMS, 5, seed=1)
    history[2, 0], mask[2] = 7, torch.arange(5) < 1
    mask[3] = False  # nothing but BOS
    exact = exact_log_probabilities(model, history, mask)
    assert exact.exp().sum(1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    assert exact.std(1).min() > 0.05
    for user in range(4):
        row = history[user][mask[user]].tolist()
        for item in range(NUM_ITEMS):
            steps = naive_steps(model, trie, [*row, item], every_code=False)[-1]
            assert float(exact[user, item]) == pytest.approx(sum(float(p[right]) for p, right in steps), abs=1e-4)
    for width in (NUM_ITEMS, NUM_ITEMS + 5):
        items, scores, log_p = beam_search(model, history, mask, width, mix_weight=0.5)
        assert torch.equal(items[:, :NUM_ITEMS], exact.topk(NUM_ITEMS, 1).indices)
        assert (items[:, NUM_ITEMS:] == -1).all()
        best = exact.topk(NUM_ITEMS, 1).values
        torch.testing.assert_close(log_p[:, :NUM_ITEMS], best, atol=1e-5, rtol=1e-5)
        assert torch.equal(scores, log_p)
    for width in (1, 3):
        items, _, log_p = beam_search(model, history, mask, width)
        torch.testing.assert_close(log_p, exact.gather(1, items), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_exact_scorer_in_small_passes(trie, monkeypatch):
    model, histories = tiny_gpt(trie), tiny_histories(3, NUM_ITEMS, 4)
    whole = exact_log_probabilities(model, *histories)
    monkeypatch.setattr("genrec_dist.generator.beam.EXACT_TOKENS", 1)
    torch.testing.assert_close(exact_log_probabilities(model, *histories), whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_padding_and_other_rows_mean_nothing(trie, head):
    model, batch = tiny_gpt(trie, head=head), windows(5, 4, seed=2)
    whole, alone = model(batch)["loss"], 0.0
    for i in range(5):
        keep = int(batch["mask"][i].sum())
        row = {name: batch[name][i : i + 1, :keep] for name in ("history", "targets", "mask")}
        alone = alone + model(row | {"count": batch["count"]})["loss"]
    torch.testing.assert_close(whole, alone)
    history, mask = batch["history"], batch["mask"]
    expected = exact_log_probabilities(model, history, mask)
    wider = torch.cat([history, torch.full((5, 2), 9)], 1)
    padded = exact_log_probabilities(model, wider, torch.cat([mask, torch.zeros(5, 2, dtype=torch.bool)], 1))
    torch.testing.assert_close(padded, expected, atol=1e-5, rtol=1e-5)
    single = exact_log_probabilities(model, history[4:][:, mask[4]], mask[4:][:, mask[4]])
    torch.testing.assert_close(single, expected[4:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_later_item_changes_nothing_before_it(trie):
    model = tiny_gpt(trie)
    items = torch.tensor([[3, 1, 4, 1, 5]])
    before = model.states(items)
    for place in range(5):
        changed = items.clone()
        changed[0, place] = 9
        states = model.states(changed)
        torch.testing.assert_close(states[:, :place], before[:, :place], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(states[:, place, 0], before[:, place, 0], atol=1e-6, rtol=1e-6)
        if place < 4:
            assert (states[:, place + 1 :] - before[:, place + 1 :]).abs().amax(3).min() > 1e-4


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *(t.untyped_storage().nbytes() // t.itemsize for t in made)])
        return out


@torch.no_grad()
def test_beams_share_the_prefix_of_their_user(trie):
    model = tiny_gpt(trie, num_heads=1, max_history=40)
    history, mask = tiny_histories(2, NUM_ITEMS, NUM_ITEMS, seed=1)
    history, mask = history.repeat(1, 2), mask.repeat(1, 2)
    _, memory, cache = model.begin(history, mask)
    length, beams = 1 + history.shape[1] * trie.max_depth, 10
    assert cache is None
    assert [tuple(part.shape) for pair in memory.keys for part in pair] == [(2, 1, length, 8)] * 4
    nodes = torch.arange(1, 3).repeat(beams)[:, None]
    with Largest() as largest:
        _, grown = model.decode(model.path_tokens(nodes), memory, None, beams)
        model.decode(model.path_tokens(nodes, 2), memory, grown, beams)
    assert [tuple(part.shape) for pair in grown for part in pair] == [(2 * beams, 1, 1, 8)] * 4
    assert largest.numel < 2 * beams * length * 8 // 4


def test_loss_of_equal_chances_by_hand():
    """Items (0), (1, 0), (1, 1, 0), (1, 1, 1): 2 codes a level; a node has 2 children."""
    codes = np.array([[0, -1, -1], [1, 0, -1], [1, 1, 0], [1, 1, 1]], np.int32)
    trie = build_trie(codes, np.array([1, 2, 3, 3], np.int32))
    batch = {"history": torch.tensor([[0, 1], [3, 0]]), "targets": torch.tensor([[1, 2], [0, 0]])}
    batch |= {"mask": torch.tensor([[True, True], [True, False]]), "count": 2.0}
    per_level, child = tiny_gpt(trie, max_history=2), tiny_gpt(trie, max_history=2, head="child")
    torch.nn.init.zeros_(child.head.query.weight)
    torch.nn.init.zeros_(child.head.query.bias)
    for parameter in per_level.head.parameters():
        torch.nn.init.zeros_(parameter)
    depths = [1, 2, 3, 3, 1]  # items 0, 1, 2 and 3, 0
    for model in (per_level, child):
        losses = {name: float(value.detach()) for name, value in model(batch).items()}
        assert losses["loss"] == pytest.approx(sum(depths) * math.log(2) / 2)
        for level, codes_there in enumerate([5, 3, 2], 1):
            assert losses[f"loss_level_{level}"] == pytest.approx(codes_there * math.log(2) / 2)


@pytest.mark.parametrize("head", HEADS)
def test_two_workers_have_the_gradient_of_one(trie, head):
    model = tiny_gpt(trie, head=head, max_history=4)
    batches = RowBatches.build(tiny_sequences(9, NUM_ITEMS, shortest=4), 4, 7, 0, torch.device("cpu"))
    indices = batches.order.batch(0)

    def gradient(*workers: Worker) -> torch.Tensor:
        model.zero_grad()
        for worker in workers:
            (model(batches.local(indices, worker))["loss"] / len(workers)).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.abs().max() > 0, name
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    torch.testing.assert_close(gradient(Worker(0, 2), Worker(1, 2)), gradient(Worker()), atol=1e-6, rtol=1e-5)


def test_an_empty_share_of_a_batch_costs_nothing(trie):
    model, batch = tiny_gpt(trie), windows(2, 3)
    losses = model({name: v[:0] if torch.is_tensor(v) else v for name, v in batch.items()})
    assert all(float(value.detach()) == 0 for value in losses.values())
    losses["loss"].backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_it_learns_what_can_be_known(trie, head):
    """Two walks from item 0: which one is a coin flip, all else follows from the items seen."""
    torch.manual_seed(0)
    model = tiny_gpt(trie, head=head, dim=16, spread=0.0, head_temperature=0.1).train()
    rows = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 5, 4, 3, 2, 1]])
    batch = {"history": rows[:, :-1], "targets": rows[:, 1:], "mask": torch.ones(2, 5, dtype=torch.bool), "count": 1.0}
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(120):
        optimizer.zero_grad()
        loss = model(batch)["loss"]
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) - 2 * math.log(2) == pytest.approx(0, abs=0.1)
    model.eval()
    for row in rows.tolist():
        for seen in range(2, 6):
            items, _, _ = beam_search(model, torch.tensor([row[:seen]]), torch.ones(1, seen, dtype=torch.bool), 3)
            assert items[0, 0] == row[seen]
    items, _, log_p = beam_search(model, torch.tensor([[0]]), torch.ones(1, 1, dtype=torch.bool), 3)
    assert set(items[0, :2].tolist()) == {1, 5}
    assert log_p[0, :2].exp().tolist() == pytest.approx([0.5, 0.5], abs=0.1)
