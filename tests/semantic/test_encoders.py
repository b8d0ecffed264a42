"""Encoders by name: where a name leads, what a hash follows, and that a shape counts what the model holds."""

from __future__ import annotations

import re

import pytest

from genrec_dist.config import SemanticConfig, build_config
from genrec_dist.errors import ConfigError
from genrec_dist.pipeline import Stage
from genrec_dist.semantic.encoders import ENCODERS, model_fingerprint, model_shape, packaged_minilm, resolve_model
from genrec_dist.semantic.stage import rows_per_shard, semantic_stage
from genrec_dist.testing.tiny_encoders import write_tiny_encoder


@pytest.mark.parametrize("name", ["llama2-7b", "sentence-t5", "bert"])
def test_a_name_leads_to_a_fixed_revision(name):
    source = resolve_model(SemanticConfig(model=name))
    assert source.path == ENCODERS[name].model
    assert re.fullmatch("[0-9a-f]{40}", source.revision)
    assert source.pooling == {"llama2-7b": "mean", "sentence-t5": "model", "bert": "mean"}[name]
    assert model_fingerprint(SemanticConfig(model=name)) == source.revision


def test_revision_and_pooling_can_be_chosen():
    source = resolve_model(SemanticConfig(model="llama2-7b", revision="main", pooling="last"))
    assert (source.revision, source.pooling) == ("main", "last")


def test_minilm_is_the_package_or_the_hub(monkeypatch):
    assert resolve_model(SemanticConfig()).path == str(packaged_minilm())
    assert resolve_model(SemanticConfig(revision="main")).path == ENCODERS["minilm"].model
    monkeypatch.setattr("genrec_dist.semantic.encoders.importlib.util.find_spec", lambda name: None)
    assert resolve_model(SemanticConfig()).path == ENCODERS["minilm"].model


def test_folders_and_hub_ids(tmp_path):
    folder = resolve_model(SemanticConfig(model=str(tmp_path)))
    assert (folder.path, folder.revision, folder.pooling) == (str(tmp_path), None, "model")
    assert resolve_model(SemanticConfig(model=str(tmp_path), engine="vllm")).pooling == "mean"
    hub = resolve_model(SemanticConfig(model="some-org/some-model", revision="abc"))
    assert (hub.path, hub.revision) == ("some-org/some-model", "abc")
    with pytest.raises(ConfigError, match="no such model folder"):
        resolve_model(SemanticConfig(model=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match="no revision"):
        resolve_model(SemanticConfig(model=str(tmp_path), revision="abc"))


def test_fingerprint_follows_the_files_and_not_the_place(tmp_path):
    for name, weights in (("a", b"1" * 10), ("b", b"1" * 10), ("c", b"2" * 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    a, b, c = (model_fingerprint(SemanticConfig(model=str(tmp_path / name))) for name in "abc")
    assert a == b != c
    (tmp_path / "b" / "config.json").write_text("{}")
    assert model_fingerprint(SemanticConfig(model=str(tmp_path / "b"))) != a
    assert model_fingerprint(SemanticConfig(model="some-org/some-model")) is None


def test_the_key_follows_the_model_and_not_where_it_lies(tmp_path):
    catalog = Stage("catalog", 1, {}, {}, lambda ctx: None)

    def key(*overrides: str) -> str:
        return semantic_stage(build_config({}, list(overrides)), catalog).key

    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(b"1")
    same = {key(f"semantic.model={tmp_path / name}") for name in "ab"}
    named = {
        key("semantic.model=llama2-7b"),
        key("semantic.model=llama2-7b", "semantic.pooling=last"),
        key("semantic.model=llama2-7b", "semantic.revision=main"),
        key("semantic.model=llama2-7b", "semantic.dtype=bfloat16"),
        key("semantic.model=llama2-7b", "semantic.store_dtype=bfloat16"),
        key("semantic.model=llama2-7b", "semantic.engine=transformers"),
    }
    assert len(same) == 1
    assert len(named) == 6
    assert key("semantic.model=llama2-7b", "semantic.pooling=mean") == key("semantic.model=llama2-7b")
    assert key("runtime.vllm.tensor_parallel_size=4", "runtime.reuse_embeddings=false") == key()


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_a_shape_counts_the_weights_of_the_layers(tmp_path, kind):
    from transformers import AutoModel

    folder = write_tiny_encoder(tmp_path, kind)
    model = AutoModel.from_pretrained(folder)
    model = model.get_encoder() if kind == "t5" else model
    layers = model.block if kind == "t5" else model.encoder.layer if kind == "bert" else model.layers
    matrices = sum(
        p.numel() for layer in layers for n, p in layer.named_parameters() if p.ndim == 2 and "relative" not in n
    )
    shape = model_shape(SemanticConfig(model=str(folder)))
    assert shape.layer_parameters * shape.num_layers == matrices
    assert shape.causal == (kind == "llama")
    assert shape.out_dim == 64


def test_named_shapes_are_those_of_the_published_models():
    millions = {name: encoder.shape.num_parameters / 1e6 for name, encoder in ENCODERS.items()}
    assert millions["llama2-7b"] == pytest.approx(6738 - 131, abs=2)  # 6,738M with the output head of 131M
    assert millions["bert"] == pytest.approx(109.5, rel=0.02)
    assert millions["sentence-t5"] == pytest.approx(110, rel=0.02)
    assert millions["minilm"] == pytest.approx(22.7, rel=0.03)


def test_flops_by_hand():
    shape = ENCODERS["minilm"].shape
    layer = 4 * 384 * 384 + 2 * 384 * 1536
    assert shape.flops(10, 10) == 10 * 6 * (2 * layer + 4 * 10 * 384)  # scores and sums: 2 x 2 x length x width
    causal = ENCODERS["llama2-7b"].shape
    assert causal.flops(1, 100) == 32 * (2 * causal.layer_parameters + 4 * 100 * 4096 / 2)


def test_shards_follow_width_and_dtype(tmp_path):
    assert rows_per_shard(SemanticConfig(model="llama2-7b", store_dtype="bfloat16")) == 2048
    assert rows_per_shard(SemanticConfig(model="llama2-7b")) == 1024
    assert rows_per_shard(SemanticConfig(model="llama2-7b", rows_per_shard=100)) == 100
    assert rows_per_shard(SemanticConfig(model="some-org/some-model")) == 2048


def test_ray_data_llm_needs_vllm_and_ray():
    catalog = Stage("catalog", 1, {}, {}, lambda ctx: None)
    for overrides in (["semantic.engine=transformers"], ["semantic.engine=vllm", "runtime.backend=local"]):
        config = build_config({}, ["runtime.embed_executor=ray_data_llm", *overrides])
        with pytest.raises(ConfigError, match="needs Ray and vLLM"):
            semantic_stage(config, catalog)
