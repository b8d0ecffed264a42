"""Engines against an unbatched reference and against each other; model names and fingerprints."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from genrec_dist.config import SemanticConfig
from genrec_dist.errors import ConfigError
from genrec_dist.semantic.engine import create_engine, model_fingerprint, resolve_model

torch = pytest.importorskip("torch")

TEXTS = ["title: red lipstick", "x", "unknown item", "brand: Acme; categories: A > B, C " * 3, "long text " * 200]


@pytest.fixture(scope="module")
def tiny_decoder(tmp_path_factory):
    """A random two-layer Llama with MiniLM's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    folder = tmp_path_factory.mktemp("decoder")
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("minilm"))
    tokenizer.pad_token = None
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaModel(config).save_pretrained(folder)
    return str(folder)


def one_by_one(model: str, max_tokens: int, normalize: bool) -> np.ndarray:
    """Mean of the hidden states, each text alone, so that no padding can leak in."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).float().eval()
    vectors = []
    for text in TEXTS:
        ids = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            vectors.append(encoder(input_ids=ids).last_hidden_state[0].mean(0).numpy())
    values = np.stack(vectors)
    return values / np.linalg.norm(values, axis=1, keepdims=True) if normalize else values


@pytest.mark.parametrize("engine", ["sentence_transformers", "transformers"])
@pytest.mark.parametrize("normalize", [True, False])
def test_minilm_equals_the_unbatched_reference(engine, normalize):
    settings = SemanticConfig(engine=engine, normalize=normalize, max_tokens=32)
    made = create_engine(settings, "cpu", 1)
    vectors, tokens = made.embed(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), made.dim) == (len(TEXTS), 384)
    expected = one_by_one(resolve_model("minilm"), 32, normalize)
    np.testing.assert_allclose(vectors, expected, atol=1e-5 * np.abs(expected).max())
    counts = made.count_tokens(TEXTS)
    assert counts[1] == 3  # [CLS] x [SEP]
    assert counts[-1] == 402
    assert tokens.tolist() == np.minimum(counts, 32).tolist()


def test_sentence_transformers_equals_transformers():
    settings = SemanticConfig()
    first, _ = create_engine(settings, "cpu", 1).embed(TEXTS)
    second, _ = create_engine(settings.model_copy(update={"engine": "transformers"}), "cpu", 1).embed(TEXTS)
    assert np.abs(first - second).max() < 1e-5


def test_decoder_without_a_padding_token(tiny_decoder):
    settings = SemanticConfig(engine="transformers", model=tiny_decoder, max_tokens=500, normalize=False)
    engine = create_engine(settings, "cpu", 1)
    assert engine.max_tokens == 64  # all that the model's positions allow
    vectors, tokens = engine.embed(TEXTS)
    assert tokens.max() == 64
    np.testing.assert_allclose(vectors, one_by_one(tiny_decoder, 64, False), atol=1e-5)


def test_missing_minilm_package_is_a_clear_error(monkeypatch):
    monkeypatch.setattr("genrec_dist.semantic.engine.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"genrec_dist\[minilm\]"):
        resolve_model("minilm")


def test_model_names(tmp_path):
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    assert resolve_model("sentence-transformers/all-MiniLM-L6-v2") == "sentence-transformers/all-MiniLM-L6-v2"
    with pytest.raises(ConfigError, match="no such model folder"):
        resolve_model(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("engine", ["sentence_transformers", "transformers"])
def test_broken_weights_are_a_config_error(tmp_path, engine):
    model = tmp_path / "model"
    shutil.copytree(resolve_model("minilm"), model)
    (model / "model.safetensors").write_bytes(b"truncated")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        create_engine(SemanticConfig(engine=engine, model=str(model)), "cpu", 1)


def test_fingerprint_follows_the_files_and_not_the_place(tmp_path):
    for name, weights in (("a", b"1" * 10), ("b", b"1" * 10), ("c", b"2" * 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    a, b, c = (model_fingerprint(str(tmp_path / name)) for name in "abc")
    assert a == b != c
    (tmp_path / "b" / "config.json").write_text("{}")
    assert model_fingerprint(str(tmp_path / "b")) != a
    assert model_fingerprint("some-org/some-model") is None
