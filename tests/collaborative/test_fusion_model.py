"""PRORec Stage I: modality adaption by hand, joint loss, and the sampled loss against the full one."""

from __future__ import annotations

import math

import pytest
import torch

from genrec_dist.collaborative.fusion import AdaLN, FusionModel, ModalityAdaption, integrate
from genrec_dist.collaborative.losses import full_softmax, info_nce
from genrec_dist.config import FusionConfig
from genrec_dist.testing.tiny import randomise, tiny_embeddings, tiny_histories

torch.set_num_threads(1)
NUM_ITEMS, BATCH = 12, 5


def make_model(**settings) -> FusionModel:
    settings = {"dim": 6, "max_history": 5, "dropout": 0.0, "num_heads": 2, "temperature": 0.3} | settings
    torch.manual_seed(0)
    model = FusionModel(FusionConfig(**settings), torch.from_numpy(tiny_embeddings(NUM_ITEMS, 4)))
    randomise(model, 0.4)
    return model.eval()


def make_batch() -> dict:
    history, mask = tiny_histories(BATCH, NUM_ITEMS, 5)
    return {
        "history": history,
        "mask": mask,
        "target": torch.tensor([3, 8, 3, 0, 11]),
        "count": float(BATCH),
        "align_items": torch.tensor([0, 3, 8, 11]),
        "align_anchors": torch.arange(4),
        "align_count": 4.0,
    }


def test_ada_ln_by_hand():
    """z = [1, 3] has mean 2 and deviation 1: LN(z) = [-1, 1]."""
    layer = AdaLN(2)
    z = torch.tensor([1.0, 3.0])
    assert layer(z).tolist() == pytest.approx([-1, 1], abs=1e-4)  # identity modulation at the start
    with torch.no_grad():  # gamma = [z1, z2] -> [1, 3], beta = [z2, 0.5] -> [3, 0.5]
        layer.modulation.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 0]]))
        layer.modulation.bias.copy_(torch.tensor([0.0, 0, 0, 0.5]))
    assert layer(z).tolist() == pytest.approx([-1 * (1 + 1) + 3, 1 * (1 + 3) + 0.5], abs=1e-3)


def test_modality_adaption_by_hand():
    """W = [[1, 0, 1], [0, 2, 0]], b = [0, -1], input [1, 2, 0] -> z = [1, 3] -> [-1, 1]."""
    layer = ModalityAdaption(3, 2)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.tensor([[1.0, 0, 1], [0, 2, 0]]))
        layer.linear.bias.copy_(torch.tensor([0.0, -1]))
    assert layer(torch.tensor([1.0, 2.0, 0.0])).tolist() == pytest.approx([-1, 1], abs=1e-4)


def test_modality_adaption_of_two_equal_texts_is_equal():
    layer = ModalityAdaption(4, 6)
    text = torch.randn(4)
    both = layer(torch.stack([text, text]))
    assert torch.equal(both[0], both[1])


@pytest.mark.parametrize("item_input", ["sum", "collaborative"])
def test_joint_loss_is_equation_5(item_input):
    model, batch = make_model(align_weight=0.25, item_input=item_input), make_batch()
    losses = model(batch)
    collaborative, adapted, table = model.items()
    torch.testing.assert_close(table, collaborative + adapted if item_input == "sum" else collaborative)
    logits = model.backbone.scores(table, batch["history"], batch["mask"], table) / 0.3
    seq = full_softmax(logits, batch["target"]) / BATCH
    chosen = batch["align_items"]
    align = info_nce(collaborative[chosen], adapted[chosen], torch.arange(4), kind="cosine", temperature=0.07) / 4
    torch.testing.assert_close(losses["loss_seq"], seq)
    torch.testing.assert_close(losses["loss_align"], align)
    torch.testing.assert_close(losses["loss"], seq + 0.25 * align)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_sampled_loss_over_the_whole_catalog_is_the_full_loss(similarity):
    full, batch = make_model(similarity=similarity), make_batch()
    sampled = make_model(similarity=similarity, loss="sampled_softmax")
    expected, got = full(batch), sampled(batch | {"negatives": torch.randperm(NUM_ITEMS)})
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-5)
    expected["loss"].backward()
    got["loss"].backward()
    for (name, a), b in zip(full.named_parameters(), sampled.parameters()):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("backbone", ["din", "sasrec"])
def test_sampled_loss_is_worked_out_from_the_catalog_scores(backbone):
    model, batch = make_model(loss="sampled_softmax", backbone=backbone), make_batch()
    negatives = torch.tensor([3, 1, 1, 7])
    loss = float(model(batch | {"negatives": negatives})["loss_seq"].detach())
    scores = model.score_catalog(batch["history"], batch["mask"]) / 0.3
    expected = 0.0
    for row, target in zip(scores, batch["target"].tolist()):
        valid = [n for n in negatives.tolist() if n != target]
        total = row[target].exp() + sum(row[n].exp() * (NUM_ITEMS - 1) / len(valid) for n in valid)
        expected += float(total.log() - row[target])
    assert loss == pytest.approx(expected / BATCH, rel=1e-4)


def test_sasrec_backbone_learns_at_every_place():
    model, batch = make_model(backbone="sasrec"), make_batch()
    targets = torch.randint(NUM_ITEMS, batch["history"].shape)
    count = float(batch["mask"].sum())
    loss = float(model(batch | {"targets": targets, "count": count})["loss_seq"].detach())
    expected = 0.0
    for history, mask, target in zip(batch["history"], batch["mask"], targets):
        for place in range(int(mask.sum())):
            scores = model.score_catalog(history[None, : place + 1], mask[None, : place + 1])[0] / 0.3
            expected -= float(scores.log_softmax(0)[target[place]])
    assert loss == pytest.approx(expected / count, rel=1e-4)


@pytest.mark.parametrize("backbone", ["din", "sasrec"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_catalog_scores_ignore_padding(backbone, similarity):
    model, batch = make_model(backbone=backbone, similarity=similarity), make_batch()
    scores = model.score_catalog(batch["history"], batch["mask"])
    garbage = torch.where(batch["mask"], batch["history"], 7)
    torch.testing.assert_close(model.score_catalog(garbage, batch["mask"]), scores, atol=1e-5, rtol=1e-5)
    assert scores.shape == (BATCH, NUM_ITEMS)


def test_integrate_by_hand():
    collaborative, adapted = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    half = math.sqrt(0.5)
    joint = integrate(collaborative, adapted, "concat")
    assert joint[0].tolist() == pytest.approx([0.6 * half, 0.8 * half, 0, half])
    assert float(joint.norm()) == pytest.approx(1)
    assert integrate(collaborative, adapted, "sum").tolist() == [[3.0, 6.0]]
    assert integrate(collaborative, adapted, "collaborative").tolist() == [[3.0, 4.0]]


def test_the_mean_cosine_of_two_concatenations_is_the_mean_of_the_cosines():
    collaborative, adapted = torch.randn(2, 4), torch.randn(2, 4)
    joint = integrate(collaborative, adapted, "concat")
    cosine = torch.nn.functional.cosine_similarity
    expected = (cosine(collaborative[0], collaborative[1], 0) + cosine(adapted[0], adapted[1], 0)) / 2
    torch.testing.assert_close(joint[0] @ joint[1], expected)
