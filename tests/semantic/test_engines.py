"""Engines against an unbatched float32 reference and against each other; batches; errors that an engine survives."""

from __future__ import annotations

import shutil
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from genrec_dist.config import SemanticConfig
from genrec_dist.errors import ConfigError
from genrec_dist.semantic.encoders import packaged_minilm
from genrec_dist.semantic.engine import create_engine, normalized, plan_batches
from genrec_dist.testing.tiny_encoders import MAX_POSITIONS, write_tiny_encoder

torch = pytest.importorskip("torch")

TEXTS = [
    "title: red lipstick",
    "x",
    "unknown item",
    "brand: Acme; categories: A > B, C " * 3,
    "long text " * 200,
    "öß 漢字",
]
PARITY = 1e-4  # of the largest value


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, str]:
    """Folders of the tiny models and of MiniLM."""
    root = tmp_path_factory.mktemp("encoders")
    tiny = {kind: str(write_tiny_encoder(root / kind, kind)) for kind in ("llama", "bert", "t5")}
    return tiny | {"minilm": str(packaged_minilm())}


def one_by_one(folder: str, pooling: str, max_tokens: int) -> np.ndarray:
    """Each text alone through transformers in float32, so that neither padding nor batching can leak in."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).float().eval()
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    vectors = []
    for text in TEXTS:
        ids = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            hidden = model(input_ids=ids).last_hidden_state[0]
        vectors.append({"mean": hidden.mean(0), "last": hidden[-1], "cls": hidden[0]}[pooling].numpy())
    return np.stack(vectors)


def embed(settings: SemanticConfig) -> np.ndarray:
    engine = create_engine(settings, "cpu", 1)
    ids, _ = engine.tokenizer(TEXTS)
    vectors = engine.embed(ids)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), engine.dim)
    return vectors


CASES = [
    (engine, model, pooling)
    for engine, models in {
        "transformers": ("llama", "bert", "t5", "minilm"),
        "sentence_transformers": ("llama", "bert", "t5", "minilm"),
        "vllm": ("llama", "bert", "minilm"),
    }.items()
    for model in models
    for pooling in (("mean", "last") if model == "llama" else ("mean", "cls") if model == "bert" else ("mean",))
]


@pytest.mark.parametrize(("engine", "model", "pooling"), CASES)
def test_engines_equal_the_unbatched_reference(encoders, engine, model, pooling):
    vectors = embed(SemanticConfig(engine=engine, model=encoders[model], pooling=pooling, max_tokens=40))
    expected = one_by_one(encoders[model], pooling, 40)
    assert np.abs(vectors - expected).max() < PARITY * np.abs(expected).max()


def test_the_model_pools_by_its_own_modules(encoders):
    vectors = embed(SemanticConfig(model="minilm", max_tokens=40))
    expected = one_by_one(encoders["minilm"], "mean", 40)
    assert np.abs(vectors - expected).max() < PARITY * np.abs(expected).max()
    from sentence_transformers import SentenceTransformer

    library = SentenceTransformer(encoders["minilm"], device="cpu")
    library.max_seq_length = 40
    np.testing.assert_allclose(normalized(vectors), library.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_bfloat16_points_the_same_way(encoders, engine):
    exact = embed(SemanticConfig(engine=engine, model=encoders["llama"], max_tokens=40))
    rough = embed(SemanticConfig(engine=engine, model=encoders["llama"], max_tokens=40, dtype="bfloat16"))
    assert np.abs(exact - rough).max() > 0
    assert (normalized(exact) * normalized(rough)).sum(1).min() > 0.999


@pytest.mark.parametrize("engine", ["transformers", "sentence_transformers", "vllm"])
def test_text_beyond_the_positions_is_cut(encoders, engine):
    made = create_engine(SemanticConfig(engine=engine, model=encoders["llama"], max_tokens=500), "cpu", 1)
    ids, cut = made.tokenizer(TEXTS)
    assert made.tokenizer.max_tokens == max(map(len, ids)) == MAX_POSITIONS
    assert cut.tolist() == [False] * 4 + [True, False]
    assert np.isfinite(made.embed(ids)).all()


def test_vllm_starts_where_numba_was_imported(encoders):
    import numba  # noqa: F401
    from llvmlite.binding import ffi

    vectors = embed(SemanticConfig(engine="vllm", model=encoders["llama"], max_tokens=32))
    assert np.isfinite(vectors).all()
    assert sys.modules["llvmlite.binding.ffi"] is ffi


def test_vllm_goes_on_after_a_text_that_it_refuses(encoders):
    engine = create_engine(SemanticConfig(engine="vllm", model=encoders["llama"], max_tokens=40), "cpu", 1)
    ids, _ = engine.tokenizer(TEXTS)
    before = engine.embed(ids)
    for bad in ([], [10**6], [1] * 41):
        with pytest.raises(Exception, match=r"empty|vocabulary|context length") as caught:
            engine.embed([*ids[:3], bad, *ids[3:]])
        assert engine.survives(caught.value)
        assert np.array_equal(engine.embed(ids), before)
    assert not engine.survives(RuntimeError("engine core died"))


def test_vllm_refuses_what_it_cannot_run(encoders):
    with pytest.raises(ConfigError, match="encoder-decoder"):
        create_engine(SemanticConfig(engine="vllm", model=encoders["t5"]), "cpu", 1)


def test_a_plain_model_needs_a_pooling(encoders):
    with pytest.raises(ConfigError, match="no pooling of its own"):
        create_engine(SemanticConfig(engine="transformers", model="sentence-t5"), "cpu", 1)


@pytest.mark.parametrize("engine", ["sentence_transformers", "transformers", "vllm"])
def test_broken_weights_are_a_config_error(tmp_path, encoders, engine):
    model = tmp_path / "model"
    shutil.copytree(Path(encoders["bert"]), model)
    (model / "model.safetensors").write_bytes(b"truncated")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        create_engine(SemanticConfig(engine=engine, model=str(model)), "cpu", 1)


def test_cuda_where_there_is_none(encoders):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="no CUDA device"):
        create_engine(SemanticConfig(), "cuda", 1)


@pytest.mark.parametrize(("rows", "tokens"), [(4, 0), (100, 30), (3, 30), (1, 0), (100, 1)])
def test_batches_hold_every_row_once_and_keep_their_limits(rows, tokens):
    lengths = np.random.default_rng(0).integers(1, 20, 57)
    batches = plan_batches(lengths, rows, tokens)
    assert sorted(np.concatenate(batches).tolist()) == list(range(57))
    sizes = [lengths[batch] for batch in batches]
    assert all(len(size) <= rows for size in sizes)
    assert all(len(size) == 1 or not tokens or len(size) * size.max() <= tokens for size in sizes)
    assert all(a.min() >= b.max() for a, b in pairwise(sizes))


def test_normalized_keeps_zero_and_nan():
    vectors = np.array([[3, 4], [0, 0], [np.nan, 1]], np.float32)
    assert np.array_equal(normalized(vectors), np.array([[0.6, 0.8], [0, 0], [np.nan, np.nan]], np.float32), True)
