"""DIN against a slow implementation with loops, SASRec's causality, and what padding may not do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from genrec_dist.collaborative.backbones import Din, SasRec, recency
from genrec_dist.testing.tiny import randomise, tiny_histories

torch.set_num_threads(1)
NUM_ITEMS, DIM, LENGTH = 15, 6, 5


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_din(attention: str, cosine: bool) -> Din:
    torch.manual_seed(1)
    din = Din(DIM, LENGTH + 2, 0.0, attention, cosine).eval()
    randomise(din, 0.5)
    return din


def make_sasrec(input_norm: bool = False) -> SasRec:
    torch.manual_seed(2)
    sasrec = SasRec(DIM, LENGTH + 2, 2, 2, 0.0, input_norm).eval()
    randomise(sasrec, 0.5)
    return sasrec


def din_by_loops(din: Din, table: torch.Tensor, history: list[int], candidate: torch.Tensor) -> float:
    """Score of one history with one candidate, place by place."""
    states = []
    for place, item in enumerate(history):
        x = din.norm(table[item] + din.position.weight[len(history) - 1 - place])
        states.append(x + F.gelu(din.state[0](x)))
    pool = torch.tensor([float(din.pool(s)) for s in states]).exp()
    pooled = sum(w * s for w, s in zip(pool / pool.sum(), states))
    user = pooled + din.user[3](F.gelu(din.user[0](pooled)))
    weights, matches = [], []
    for state in states:
        if din.attention_kind == "dot":
            weights.append(torch.dot(din.key(state), candidate) / DIM**0.5)
        else:
            hidden = din.unit[0](torch.cat([state, candidate, state - candidate, state * candidate]))
            hidden = torch.where(hidden > 0, hidden, din.unit[1].weight * hidden)
            weights.append(din.unit[2](hidden)[0])
        value = din.value(state)
        matches.append(F.cosine_similarity(value, candidate, 0) if din.cosine else torch.dot(value, candidate))
    weight = torch.stack(weights).exp()
    interest = (weight / weight.sum() * torch.stack(matches)).sum()
    plain = F.cosine_similarity(user, candidate, 0) if din.cosine else torch.dot(user, candidate)
    share = 1 / (1 + torch.exp(-din.mix))
    return float(share * interest + (1 - share) * plain)


@pytest.mark.parametrize("attention", ["dot", "mlp"])
@pytest.mark.parametrize("cosine", [True, False])
@torch.no_grad()
def test_din_against_loops(attention, cosine):
    din, table = make_din(attention, cosine), draw(NUM_ITEMS, DIM)
    history, mask = tiny_histories(5, NUM_ITEMS, LENGTH)
    candidates = draw(4, DIM, seed=3)
    scores = din.scores(table, history, mask, candidates)
    expected = [[din_by_loops(din, table, h[m].tolist(), c) for c in candidates] for h, m in zip(history, mask)]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["dot", "mlp"])
@torch.no_grad()
def test_din_does_not_see_padding(attention):
    din, table = make_din(attention, True), draw(NUM_ITEMS, DIM)
    history, mask = tiny_histories(6, NUM_ITEMS, LENGTH, seed=1)
    garbage = torch.where(mask, history, torch.randint(NUM_ITEMS, history.shape))
    wider = torch.cat([garbage, torch.full((6, 2), 3)], 1)
    wider_mask = torch.cat([mask, torch.zeros(6, 2, dtype=torch.bool)], 1)
    expected = din.scores(table, history, mask, table)
    assert torch.equal(din.scores(table, garbage, mask, table), expected)
    torch.testing.assert_close(din.scores(table, wider, wider_mask, table), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("attention", ["dot", "mlp"])
@torch.no_grad()
def test_a_single_item_gets_all_the_attention(attention):
    din, table = make_din(attention, False), draw(NUM_ITEMS, DIM)
    history, mask = torch.tensor([[7]]), torch.tensor([[True]])
    state = din.norm(table[7] + din.position.weight[0])
    state = state + F.gelu(din.state[0](state))
    user = state + din.user[3](F.gelu(din.user[0](state)))
    share = torch.sigmoid(din.mix)
    expected = (share * din.value(state) + (1 - share) * user) @ table.T
    torch.testing.assert_close(din.scores(table, history, mask, table)[0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_depends_on_the_candidate():
    din, table = make_din("dot", True), draw(NUM_ITEMS, DIM)
    history, mask = tiny_histories(3, NUM_ITEMS, LENGTH)
    alone = [din.scores(table, history, mask, table[i : i + 1]) for i in range(NUM_ITEMS)]
    torch.testing.assert_close(torch.cat(alone, 1), din.scores(table, history, mask, table), atol=1e-6, rtol=1e-5)
    din.key.weight.zero_()
    din.key.bias.zero_()
    assert not torch.allclose(torch.cat(alone, 1), din.scores(table, history, mask, table), atol=1e-3)


@pytest.mark.parametrize("attention", ["dot", "mlp"])
def test_every_parameter_of_din_is_used(attention):
    din, table = make_din(attention, True), draw(NUM_ITEMS, DIM)
    history, mask = tiny_histories(8, NUM_ITEMS, LENGTH + 2)
    din.scores(table, history, mask, table).square().sum().backward()
    unused = {name for name, p in din.named_parameters() if p.grad is None or not p.grad.any()}
    assert unused <= {"pool.bias"}  # a softmax does not see it: its gradient is zero, or rounding


@pytest.mark.parametrize("input_norm", [False, True])
@torch.no_grad()
def test_sasrec_does_not_look_ahead(input_norm):
    sasrec, table = make_sasrec(input_norm), draw(NUM_ITEMS, DIM)
    history = torch.tensor([[1, 2, 3, 4, 5]])
    states = sasrec.states(table, history)
    for place in range(1, 5):
        changed = history.clone()
        changed[0, place] = 9
        other = sasrec.states(table, changed)
        torch.testing.assert_close(other[:, :place], states[:, :place], atol=1e-6, rtol=1e-6)
        assert (other[:, place:] - states[:, place:]).abs().amax(2).min() > 1e-4


@torch.no_grad()
def test_user_state_is_that_of_the_newest_item():
    sasrec, table = make_sasrec(), draw(NUM_ITEMS, DIM)
    history, mask = tiny_histories(6, NUM_ITEMS, LENGTH, seed=2)
    users = sasrec.user(table, history, mask)
    for row, keep, user in zip(history, mask, users):
        torch.testing.assert_close(sasrec.states(table, row[keep][None])[0, -1], user, atol=1e-5, rtol=1e-5)


def test_recency_by_hand():
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    assert recency(mask).tolist() == [[2, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attention", ["dot", "mlp"])
def test_din_in_half_precision(attention, dtype):
    din, table = make_din(attention, True), draw(NUM_ITEMS, DIM)
    history, mask = tiny_histories(6, NUM_ITEMS, LENGTH)
    exact = din.scores(table, history, mask, table)
    with torch.autocast("cpu", dtype):
        rough = din.scores(table, history, mask, table)
    torch.testing.assert_close(rough.float(), exact, atol=0.05, rtol=0.05)
