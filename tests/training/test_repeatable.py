"""Gradients on a CPU with two threads are the same to the last bit whenever they are computed.

Batches are large enough for PyTorch to cut their gathers up among threads, and hit few rows again and again.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from genrec_dist.baselines.hstu import HstuModel
from genrec_dist.baselines.sasrec import SasrecModel
from genrec_dist.collaborative.fusion import FusionModel
from genrec_dist.config import FusionConfig, HstuConfig, RqvaeConfig, SasrecConfig
from genrec_dist.identifiers.quantizer import ResidualQuantizer
from genrec_dist.testing.tiny import tiny_embeddings, tiny_generator, tiny_trie

NUM_ITEMS, ROWS, LENGTH = 20, 256, 20


def stage_one(**settings) -> FusionModel:
    section = FusionConfig(dim=32, num_heads=2, dropout=0.1, **settings)
    return FusionModel(section, torch.from_numpy(tiny_embeddings(NUM_ITEMS))).train()


def generator() -> torch.nn.Module:
    trie = tiny_trie(NUM_ITEMS, 4, seed=1)
    return tiny_generator(trie, dim=64, max_history=LENGTH, embedding_dim=32, dropout=0.1).train()


class Codebooks(torch.nn.Module):
    """RQ-VAE's codes, learned by gradients, of 4,096 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.quantizer = ResidualQuantizer(RqvaeConfig(codebook="gradient"), 2, 8, 32)
        self.rows = torch.randn(4096, 32)

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        return {"loss": self.quantizer(self.rows).codebook.sum()}


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "fusion_din": lambda: stage_one(backbone="din"),
    "fusion_sasrec": lambda: stage_one(backbone="sasrec"),
    "fusion_sampled": lambda: stage_one(backbone="din", loss="sampled_softmax"),
    "sasrec": lambda: SasrecModel(SasrecConfig(dim=32, num_heads=2, dropout=0.1), NUM_ITEMS).train(),
    "hstu": lambda: HstuModel(HstuConfig(dim=32, num_heads=2, dropout=0.1), NUM_ITEMS).train(),
    "generator": generator,
    "rqvae": Codebooks,
}


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_do_not_depend_on_which_thread_was_first(two_threads, name):
    torch.manual_seed(0)
    model = MODELS[name]()
    history, target = torch.randint(NUM_ITEMS, (ROWS, LENGTH)), torch.randint(NUM_ITEMS, (ROWS,))
    mask = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (ROWS, 1))
    batch = {
        "history": history * mask,
        "mask": mask,
        "target": target,
        "targets": torch.randint(NUM_ITEMS, (ROWS, LENGTH)),
        "times": torch.arange(LENGTH + 1).expand(ROWS, -1) * 3600,
        "negatives": torch.randint(NUM_ITEMS, (ROWS * 8,)),
        "count": ROWS,
        "align_items": torch.arange(NUM_ITEMS),
        "align_anchors": torch.arange(NUM_ITEMS),
        "align_count": NUM_ITEMS,
    }

    def gradients() -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        model(batch)["loss"].backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    first = gradients()
    for _ in range(10):
        for parameter, found in gradients().items():
            assert torch.equal(found, first[parameter]), parameter
