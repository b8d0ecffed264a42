"""Llama2-7b embeddings on one GPU: tokens/s of engines and of the whole stage, beside the measured matmul ceiling.

A model of Llama2-7b's exact shape with random weights costs what the real one costs, so no weights are needed. Texts
are a catalog's; the stage (Parquet in, Zarr out) and the bare engine loops read the same ones.

    python benchmarks/embed_llama_gpu.py --items store/catalog/KEY/items.parquet --tokenizer FOLDER --variants all
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from device_rates import matmul_rate

from genrec_dist.artifacts.embeddings import num_shards
from genrec_dist.artifacts.reader import EmbeddingStore
from genrec_dist.config import SemanticConfig, VllmConfig
from genrec_dist.semantic.encoders import ENCODERS
from genrec_dist.semantic.engine import create_engine, plan_batches
from genrec_dist.semantic.price import probe_speed
from genrec_dist.semantic.stage import rows_per_shard
from genrec_dist.semantic.text import FIELDS, item_texts
from genrec_dist.semantic.worker import EmbedJob, ShardEmbedder

SHAPE = ENCODERS["llama2-7b"].shape


def write_model(folder: Path, tokenizer: Path, layers: int) -> None:
    """A Llama2-7b-shaped model folder, weights drawn from Normal(0, .02) on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(tokenizer, folder)
    config = LlamaConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.dim,
        intermediate_size=SHAPE.ffn_dim,
        num_hidden_layers=layers,
        num_attention_heads=SHAPE.num_heads,
        num_key_value_heads=SHAPE.num_kv_heads,
        max_position_embeddings=4096,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="4GB")


def line(name: str, lengths: np.ndarray, seconds: float, ceiling: float) -> dict:
    """Print and return one row of the result."""
    tokens = int(lengths.sum())
    tflops = SHAPE.flops(tokens, float((lengths.astype(float) ** 2).sum() / tokens)) / seconds / 1e12
    row = {
        "variant": name,
        "rows": len(lengths),
        "seconds": round(seconds, 3),
        "rows_per_second": round(len(lengths) / seconds, 1),
        "tokens_per_second": round(tokens / seconds),
        "tflops": round(tflops, 1),
        "share_of_ceiling": round(tflops / ceiling, 3),
    }
    print(json.dumps(row), flush=True)
    return row


def timed(call) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


VARIANTS = {
    "vllm": ("vllm", {}),
    "transformers": ("transformers", {}),
    "vllm, step 8192": ("vllm", {"max_batched_tokens": 8192}),
    "vllm, step 32768": ("vllm", {"max_batched_tokens": 32768}),
    "vllm, compiled": ("vllm", {"enforce_eager": False}),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer with at most 32,000 tokens")
    parser.add_argument("--layers", type=int, default=SHAPE.num_layers)
    parser.add_argument("--variants", default="vllm;transformers", help=f"of {'; '.join(VARIANTS)}, or all")
    parser.add_argument("--out", type=Path, help="folder for results.jsonl")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ceiling", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="embed-"))
    names = list(VARIANTS) if args.variants == "all" else args.variants.split(";")
    if args.model is not None:  # a child: one variant in a process of its own
        measure(names[0], args.model, args.items, out, args.ceiling)
        return
    ceiling = matmul_rate(torch.bfloat16, torch.device("cuda")) / 1e12
    print(f"{torch.cuda.get_device_name()}: bf16 matmul ceiling {ceiling:.0f} TFLOP/s", flush=True)
    model = Path(tempfile.mkdtemp(prefix="embed-")) / "model"
    began = time.perf_counter()
    write_model(model, args.tokenizer, args.layers)
    torch.cuda.empty_cache()
    print(f"model folder written in {time.perf_counter() - began:.0f} s", flush=True)
    for name in names:
        options = ["--items", args.items, "--model", model, "--variants", name, "--ceiling", ceiling, "--out", out]
        subprocess.run([sys.executable, __file__, *map(str, options)], check=False)
    first = [np.load(file) for file in sorted(out.glob("vectors-*.npy"))]
    for other in first[1:]:
        cosine = (first[0] * other).sum(1) / np.linalg.norm(first[0], axis=1) / np.linalg.norm(other, axis=1)
        print(f"cosine of {len(cosine)} vectors with the first engine's: min {cosine.min():.6f}", flush=True)
    settings = SemanticConfig(model=str(model), dtype="bfloat16")
    texts, _ = item_texts(pq.read_table(args.items, columns=list(FIELDS)), settings.template)
    lengths = np.array([len(row) for row in _ids(settings, texts)])
    speed, _ = probe_speed(settings, SHAPE, lengths, "cuda")
    print(f"probe of the dry run: {speed:,.0f} tokens/s", flush=True)
    shutil.rmtree(model.parent)


def _ids(settings: SemanticConfig, texts: list[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    from genrec_dist.semantic.tokens import TextTokenizer

    return TextTokenizer(AutoTokenizer.from_pretrained(settings.model), settings.max_tokens)(texts)[0]


def measure(name: str, model: Path, items: Path, out: Path, ceiling: float) -> None:
    """Time the bare loops and the stage on one engine; leave some vectors and the rows of the result in `out`."""
    kind, options = VARIANTS[name]
    vllm = VllmConfig(gpu_memory_fraction=0.85, **options)
    settings = SemanticConfig(
        engine=kind, model=str(model), dtype="bfloat16", store_dtype="bfloat16", normalize=False, pooling="mean"
    )
    texts, _ = item_texts(pq.read_table(items, columns=list(FIELDS)), settings.template)
    began = time.perf_counter()
    engine = create_engine(settings, "cuda", 0, vllm)
    print(f"{name}: engine started in {time.perf_counter() - began:.0f} s", flush=True)
    ids, _ = engine.tokenizer(texts)
    lengths = np.array([len(row) for row in ids])
    order = np.argsort(-lengths, kind="stable")
    batches = plan_batches(lengths, engine.batch_rows, engine.batch_tokens)
    prompts = [{"prompt_token_ids": ids[n]} for n in order]
    sorted_texts = [texts[n] for n in order]
    limits = {"truncation": True, "max_length": engine.tokenizer.max_tokens}
    per_shard = rows_per_shard(settings.model_copy(update={"model": "llama2-7b"}))
    engine.embed([ids[n] for n in order[:64]])  # warm-up
    engine.embed([ids[n] for n in order[-64:]])

    def stage(folder: Path) -> None:
        job = EmbedJob(folder, items, len(texts), per_shard, settings, "cuda", vllm=vllm)
        job.make_folders()
        ShardEmbedder(job, engine).embed_shards(list(range(num_shards(len(texts), per_shard))))

    runs = {"engine loop over batches of ids": lambda: [engine.embed([ids[n] for n in batch]) for batch in batches]}
    if kind == "vllm":
        runs |= {
            "bare LLM.embed, ids": lambda: engine.llm.embed(prompts, use_tqdm=False),
            "bare LLM.embed, texts": lambda: engine.llm.embed(sorted_texts, use_tqdm=False, tokenization_kwargs=limits),
        }
    rows = []
    for repeat in range(2):
        for label, call in runs.items():
            seconds = timed(call)
            rows.append(line(f"{name}: {label}", lengths, seconds, ceiling))
        folder = model.parent / f"out-{repeat}"
        seconds = timed(lambda folder=folder: stage(folder))
        rows.append(line(f"{name}: stage, Parquet to Zarr", lengths, seconds, ceiling))
        vectors = EmbeddingStore(folder).rows(np.arange(256))
        shutil.rmtree(folder)
    np.save(out / f"vectors-{kind}.npy", vectors)
    with open(out / "results.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
