"""Losses over item tables against cases worked by hand and against one another."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from genrec_dist.collaborative.losses import full_softmax, info_nce, sampled_softmax, scale_of, similarity

torch.set_num_threads(1)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_similarity_by_hand():
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 2.0], [5.0, 0.0]])
    assert similarity(a, b, "dot").tolist() == [[8.0, 15.0], [0.0, 5.0]]
    assert similarity(a, b, "inner").tolist() == [[8.0, 15.0], [0.0, 5.0]]
    assert similarity(a, b, "cosine").tolist() == [pytest.approx([0.8, 0.6]), pytest.approx([0.0, 1.0])]


def test_similarity_stays_in_float32_under_autocast():
    a, b = draw(4, 8), draw(5, 8, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(similarity(a, b, "cosine"), similarity(a, b, "cosine").float())
        low = similarity(a, b, "dot")
    assert low.dtype == torch.float32
    assert torch.equal(low, a @ b.T)


def test_temperature_scales_cosines_only():
    assert scale_of("cosine", 0.05) == pytest.approx(20)
    assert scale_of("dot", 0.05) == scale_of("inner", 0.05) == 1


def test_info_nce_by_hand():
    """Two anchors along the axes, three candidates, dot products at temperature 1/2."""
    anchors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    candidates = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.0, 0.5]])
    positives = torch.tensor([0, 1])
    # logits: anchor 0 -> [2, 1, 0], anchor 1 -> [0, 2, 1]
    denominator = math.exp(2) + math.exp(1) + 1
    loss = info_nce(anchors, candidates, positives, kind="dot", temperature=0.5)
    assert float(loss) == pytest.approx(2 * (math.log(denominator) - 2))
    loss = info_nce(anchors, candidates, positives, kind="dot", temperature=0.5, positive_in_denominator=False)
    assert float(loss) == pytest.approx(2 * (math.log(math.exp(1) + 1) - 2))


def test_info_nce_cosine_ignores_length():
    anchors, candidates, positives = draw(3, 4), draw(5, 4, seed=1), torch.tensor([4, 0, 2])
    plain = info_nce(anchors, candidates, positives, kind="cosine", temperature=0.1)
    stretched = info_nce(7 * anchors, 0.3 * candidates, positives, kind="cosine", temperature=0.1)
    torch.testing.assert_close(plain, stretched)
    assert not torch.isclose(plain, info_nce(anchors, candidates, positives, kind="dot", temperature=0.1))


def test_info_nce_is_a_sum_over_anchors():
    anchors, candidates, positives = draw(4, 4), draw(6, 4, seed=1), torch.tensor([5, 1, 0, 3])
    whole = info_nce(anchors, candidates, positives, kind="cosine", temperature=0.2)
    parts = [
        info_nce(anchors[i : i + 1], candidates, positives[i : i + 1], kind="cosine", temperature=0.2) for i in range(4)
    ]
    torch.testing.assert_close(whole, sum(parts))


def test_info_nce_of_a_lone_item_has_no_contrast():
    """The last batch of an epoch can hold one item; equation 3 to the letter has an empty denominator there."""
    anchor = draw(1, 4).requires_grad_()
    loss = info_nce(
        anchor, draw(1, 4, seed=1), torch.tensor([0]), kind="cosine", temperature=0.1, positive_in_denominator=False
    )
    loss.backward()
    assert loss.item() == 0
    assert float(anchor.grad.abs().max()) == 0


def test_full_softmax_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])
    assert float(full_softmax(logits, torch.tensor([1, 1]))) == pytest.approx(math.log(4 / 3) + math.log(5))


def test_sampled_softmax_of_all_items_is_the_full_one():
    scores, target = draw(6, 20), torch.arange(6) * 3
    draws = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    sampled = sampled_softmax(
        scores.gather(1, target[:, None]).squeeze(1), scores[:, draws], draws == target[:, None], 19
    )
    torch.testing.assert_close(sampled, full_softmax(scores, target))


def test_sampled_softmax_by_hand():
    """Ten items, draws with logits 0, 0 and a hit: each valid draw stands for 9 / 2 items."""
    hit = torch.tensor([[False, False, True]])
    loss = sampled_softmax(torch.tensor([1.0]), torch.tensor([[0.0, 0.0, 1.0]]), hit, 9)
    assert float(loss) == pytest.approx(math.log(math.e + 2 * 4.5) - 1)


def test_correction_makes_the_partition_sum_unbiased():
    """exp(loss + positive) is the estimated denominator of the softmax; its mean over draws is the true one."""
    scores, target, num_items = draw(1, 12) * 1.5, 4, 12
    truth = float(scores.exp().sum())
    rng, estimates = np.random.default_rng(0), []
    positive = scores[:, target]
    for _ in range(4000):
        draws = torch.from_numpy(rng.integers(num_items, size=5))
        if (draws == target).all():
            continue
        loss = sampled_softmax(positive, scores[:, draws], draws[None] == target, num_items - 1)
        estimates.append(float((loss + positive).exp()))
    error = np.std(estimates) / math.sqrt(len(estimates))
    assert np.mean(estimates) == pytest.approx(truth, abs=4 * error)
    assert error < 0.03 * truth


def test_sampled_softmax_with_hits_only_is_finite():
    loss = sampled_softmax(torch.tensor([0.3]), torch.tensor([[0.3, 0.3]]), torch.tensor([[True, True]]), 9)
    assert float(loss) == pytest.approx(0.0)
