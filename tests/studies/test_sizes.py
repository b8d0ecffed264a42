"""Sizes by formula against the real modules: parameters exactly, FLOPs against PyTorch's counter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from genrec_dist.baselines.hstu import HstuModel
from genrec_dist.baselines.sasrec import SasrecModel
from genrec_dist.collaborative.fusion import FusionModel
from genrec_dist.config import (
    FusionConfig,
    GeneratorConfig,
    GptConfig,
    HstuConfig,
    IdentifierConfig,
    OptimConfig,
    RuntimeConfig,
    SasrecConfig,
)
from genrec_dist.generator.beam import beam_search
from genrec_dist.generator.beam_decoder import ModelDecoder
from genrec_dist.generator.gpt import GptGenerator
from genrec_dist.generator.model import Generator
from genrec_dist.generator.search_tables import SearchTables
from genrec_dist.identifiers.trie import Trie, build_trie
from genrec_dist.studies.memory import search_memory, training_memory
from genrec_dist.studies.sizes import (
    CodebookSize,
    Counts,
    ModelSize,
    batch_arithmetic,
    expected_codebook,
    fusion_size,
    generator_size,
    gpt_size,
    hstu_size,
    sasrec_size,
)
from genrec_dist.testing.tiny import tiny_generator, tiny_gpt, tiny_histories, tiny_trie

NUM_ITEMS, HISTORY, BATCH = 24, 6, 8


@pytest.fixture(scope="module")
def trie() -> Trie:
    """24 items: 4 children of the root with 6 leaves each."""
    codes = np.array([[i // 6, i % 6] for i in range(NUM_ITEMS)], np.int32)
    return build_trie(codes, np.full(NUM_ITEMS, 2, np.int32))


def size_of(trie: Trie) -> CodebookSize:
    widths = tuple(trie.max_children(level) for level in range(trie.max_depth))
    return CodebookSize(trie.num_nodes, trie.max_depth, int(trie.code.max()) + 1, widths)


def trainable(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def held(module: torch.nn.Module, *names: str) -> int:
    return sum(dict(module.named_buffers())[name].numel() for name in names)


def measured_flops(module: torch.nn.Module, batch: dict) -> float:
    """Forward FLOPs of one sample, measured; the counter does not know the CPU's fused attention kernel."""
    module.eval()
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(batch)
    return counter.get_total_flops() / BATCH


def prefix_batch(**more: object) -> dict:
    history = torch.arange(BATCH * HISTORY).view(BATCH, HISTORY) % NUM_ITEMS
    mask = torch.ones(BATCH, HISTORY, dtype=torch.bool)
    times = torch.zeros(BATCH, HISTORY + 1, dtype=torch.int64)
    return {
        "history": history,
        "mask": mask,
        "times": times,
        "target": torch.arange(BATCH),
        "count": float(BATCH),
    } | more


def row_batch() -> dict:
    batch = prefix_batch()
    return batch | {"targets": batch["history"].roll(-1, 1), "count": float(BATCH * HISTORY)}


def aligned() -> dict:
    items = torch.arange(BATCH)
    return {"align_items": items, "align_anchors": items, "align_count": float(BATCH)}


@pytest.mark.parametrize("head", ["child", "per_level"])
@pytest.mark.parametrize("encoder_input", ["item", "codes"])
@pytest.mark.parametrize(
    "change", [{}, {"distill_weight": 0.0}, {"item_embedding_rate": 0}, {"ffn_multiplier": 2}, {"time_bumps": 40}]
)
def test_generator_size_is_that_of_the_model(trie: Trie, head: str, encoder_input: str, change: dict) -> None:
    config = GeneratorConfig(
        dim=16, num_heads=2, max_history=HISTORY, num_decoder_layers=3, head=head, encoder_input=encoder_input, **change
    )
    model = Generator(config, trie, torch.randn(NUM_ITEMS, 20))
    size = generator_size(config, size_of(trie), NUM_ITEMS, width=20)
    assert size.num_parameters == trainable(model)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert sum(size.constants.values()) == held(model, "integrated") + frozen
    assert size.forward_flops == pytest.approx(measured_flops(model, prefix_batch()), rel=0.02)


def test_generator_groups_are_those_of_its_modules(trie: Trie) -> None:
    config = GeneratorConfig(dim=16, num_heads=2, max_history=HISTORY)
    model = Generator(config, trie, torch.randn(NUM_ITEMS, 20))
    groups = generator_size(config, size_of(trie), NUM_ITEMS, width=20).parameters
    assert groups["decoder"] == trainable(model.decoder) + trainable(model.decoder_norm)
    assert groups["encoder"] == trainable(model.encoder) + trainable(model.encoder_norm)
    assert groups["node embeddings"] == trainable(model.head.nodes)


@pytest.mark.parametrize("bumps", [0, 40])
@pytest.mark.parametrize("attention", ["dot", "mlp"])
def test_din_fusion_size_is_that_of_the_model(attention: str, bumps: int) -> None:
    loss = "sampled_softmax" if attention == "mlp" else "full_softmax"
    optim = OptimConfig(batch_size=BATCH)
    config = FusionConfig(
        dim=16,
        max_history=HISTORY,
        attention=attention,
        loss=loss,
        num_negatives=12,
        time_bumps=bumps,
        optim=optim,
    )
    model = FusionModel(config, torch.randn(NUM_ITEMS, 20))
    size = fusion_size(config, NUM_ITEMS, semantic_dim=20)
    assert size.num_parameters == trainable(model)
    assert sum(size.constants.values()) == held(model, "semantic")
    batch = prefix_batch(negatives=torch.arange(12), **aligned())
    assert size.forward_flops == pytest.approx(measured_flops(model, batch), rel=0.02)


@pytest.mark.parametrize("bumps", [0, 40])
def test_self_attentive_fusion_size_is_that_of_the_model(bumps: int) -> None:
    optim = OptimConfig(batch_size=BATCH)
    config = FusionConfig(backbone="sasrec", dim=16, max_history=HISTORY, time_bumps=bumps, optim=optim)
    model = FusionModel(config, torch.randn(NUM_ITEMS, 20))
    size = fusion_size(config, NUM_ITEMS, semantic_dim=20, mean_targets=HISTORY)
    assert size.num_parameters == trainable(model)
    assert size.forward_flops == pytest.approx(measured_flops(model, row_batch() | aligned()), rel=0.02)


def test_sasrec_size_is_that_of_the_model() -> None:
    config = SasrecConfig(dim=16, num_layers=3, max_history=HISTORY)
    model = SasrecModel(config, NUM_ITEMS)
    size = sasrec_size(config, NUM_ITEMS, mean_targets=HISTORY)
    assert size.num_parameters == trainable(model)
    assert size.forward_flops == pytest.approx(measured_flops(model, row_batch()), rel=0.02)


def test_counts_follow_the_leave_one_out_split() -> None:
    # Train parts 3, 1 and 2 long (the last user has no held-out target): 2 + 0 + 1 pairs.
    counts = Counts(3, 10, 10, lengths=np.array([5, 3, 2]))
    assert counts.num_prefixes == 3
    assert counts.num_windows(2) == 2
    assert counts.num_windows(1) == 3
    # Ten users of 9 on average: 6 pairs each, in windows of 4.
    estimate = Counts(10, 50, 90)
    assert (estimate.num_prefixes, estimate.num_windows(4)) == (60, 20)


def test_batch_arithmetic() -> None:
    found = batch_arithmetic(1001, OptimConfig(batch_size=100, epochs=3), num_workers=4)
    assert (found.per_worker, found.steps_per_epoch, found.total_steps) == (25, 11, 33)


def test_expected_codebook() -> None:
    book = expected_codebook(IdentifierConfig(num_clusters=4, balanced=True), 30)
    assert (book.max_depth, book.num_nodes, book.widths) == (3, 1 + 4 + 16 + 30, (4, 4, 2))
    assert expected_codebook(IdentifierConfig(num_clusters=256), 200).max_depth == 1


@pytest.mark.parametrize(
    ("stage", "parameters", "gradients", "optimiser"),
    [(0, 400, 400, 800), (1, 400, 400, 300), (2, 400, 100, 300), (3, 100, 100, 300)],
)
def test_zero_shards_what_its_stage_says(stage: int, parameters: int, gradients: int, optimiser: int) -> None:
    """From stage 1 on DeepSpeed has a float32 copy of its shard beside the two moments."""
    size = ModelSize({"all": 100}, {"table": 10}, activation_values=7)
    memory = training_memory(size, 3, RuntimeConfig(num_workers=4, zero_stage=stage), zero=True)
    assert memory == {
        "parameters": parameters,
        "gradients": gradients,
        "optimiser": optimiser,
        "constants": 40,
        "activations": 84,
    }
    assert training_memory(size, 3, RuntimeConfig(num_workers=4, zero_stage=stage), zero=False)["optimiser"] == 800
    averaged = training_memory(size, 3, RuntimeConfig(num_workers=4, zero_stage=stage), zero=True, averaged=True)
    assert averaged["optimiser"] == optimiser + (100 if stage else 400)


@pytest.mark.parametrize("head", ["per_level", "child"])
def test_gpt_size_is_that_of_the_model(trie: Trie, head: str) -> None:
    config = GptConfig(dim=16, num_heads=4, num_layers=3, ffn_multiplier=2, head=head, max_history=HISTORY)
    model = GptGenerator(config, trie, torch.randn(NUM_ITEMS, 20))
    size = gpt_size(config, size_of(trie), 20, mean_targets=HISTORY)
    assert size.num_parameters == trainable(model)
    history = torch.arange(BATCH * HISTORY).view(BATCH, HISTORY) % NUM_ITEMS
    batch = {"history": history, "targets": (history + 1) % NUM_ITEMS, "mask": torch.ones_like(history).bool()}
    measured = measured_flops(model, batch | {"count": float(BATCH * HISTORY)})
    assert size.forward_flops == pytest.approx(measured, rel=0.02)


def test_codebooks_of_fixed_depth() -> None:
    rqvae = expected_codebook(IdentifierConfig(tokenizer="rqvae", num_clusters=256, num_levels=4), 12_101)
    assert (rqvae.max_depth, rqvae.num_codes) == (5, 256)
    random = expected_codebook(IdentifierConfig(tokenizer="random", num_clusters=256, num_levels=4), 12_101)
    assert random.max_depth == 4


@pytest.mark.parametrize("similarity", ["cosine", "inner"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_hstu_size_is_that_of_the_model(similarity: str, num_layers: int) -> None:
    config = HstuConfig(dim=16, num_layers=num_layers, max_history=HISTORY, similarity=similarity)
    model = HstuModel(config, NUM_ITEMS)
    size = hstu_size(config, NUM_ITEMS, mean_targets=HISTORY)
    assert size.num_parameters == trainable(model)
    batch = row_batch() | {"times": torch.zeros(BATCH, HISTORY + 1, dtype=torch.int64)}
    assert size.forward_flops == pytest.approx(measured_flops(model, batch), rel=0.02)


class Counting(ModelDecoder):
    """Counts the numbers in keys and values of the users, and in every copy of those of the beams."""

    kept, copied = 0, 0

    def step(self, token_R, source_R, memory, state, beams, last):
        of_users = memory.keys if hasattr(memory, "keys") else memory[0]
        self.kept = sum(part.numel() for pair in of_users for part in pair)
        if state is not None:
            self.copied += sum(part[source_R].numel() for pair in state for part in pair)
        hidden, state = super().step(token_R, source_R, memory, state, beams, last)
        self.copied += sum(part.numel() for pair in state for part in pair)
        return hidden, state


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (tiny_generator, {"distill_position": "start"}),
        (tiny_generator, {"distill_position": "end"}),
        (tiny_generator, {"distill_weight": 0.0, "encoder_input": "codes"}),
        (tiny_gpt, {}),
    ],
)
def test_a_search_keeps_what_its_formula_says(make, settings, depth) -> None:
    """Three layers against two: what is left is a layer's keys and values, as the real search copies them."""
    users, width, book = 5, 4, tiny_trie(40, 7, depth=depth)
    model = make(book, max_history=HISTORY, **settings)
    tables = SearchTables(model)
    counting = tables.decoder = Counting(model, tables._tokens)
    beam_search(model, *tiny_histories(users, 40, HISTORY), width, 0.0, tables, static=True)
    key = "num_decoder_layers" if make is tiny_generator else "num_layers"
    three, two = (
        search_memory(model.config.model_copy(update={key: layers}), size_of(book), users, width) for layers in (3, 2)
    )
    assert getattr(model.config, key) == 2
    assert three - two == 4 * (counting.kept + counting.copied) / 2


def test_a_search_holds_beams_in_proportion_and_one_layer_at_work() -> None:
    config, book = GeneratorConfig(dim=16, num_heads=4, num_decoder_layers=1), CodebookSize(1000, 3, 16, (16, 16, 4))
    of = lambda users, width, **changes: search_memory(config.model_copy(update=changes), book, users, width)  # noqa: E731
    assert of(64, 20) == 2 * of(32, 20)
    assert of(64, 20) < of(64, 40) < 2 * of(64, 20)  # the users' histories are the same
    at_work = of(64, 20) - (of(64, 20, num_decoder_layers=2) - of(64, 20))
    assert at_work == of(64, 20, num_decoder_layers=0) > 0


@pytest.mark.parametrize("make", ["gpt", "sasrec", "hstu"])
def test_places_of_padding_have_logits_on_a_gpu(make: str, trie: Trie) -> None:
    """With what padding adds, rows of few targets take what full rows take."""
    sizes = {
        "gpt": lambda targets: gpt_size(GptConfig(max_history=HISTORY), size_of(trie), 20, targets),
        "sasrec": lambda targets: sasrec_size(SasrecConfig(max_history=HISTORY), NUM_ITEMS, targets),
        "hstu": lambda targets: hstu_size(HstuConfig(max_history=HISTORY), NUM_ITEMS, targets),
    }[make]
    few, full = sizes(2), sizes(HISTORY)
    assert few.activation_values < full.activation_values
    assert few.activation_values + few.padded_values == full.activation_values
    assert full.padded_values == 0
