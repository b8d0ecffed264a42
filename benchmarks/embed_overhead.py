"""The whole embedding stage (Ray, Parquet in, Zarr out) beside bare loops of vLLM, sentence-transformers, transformers.

All variants embed the same texts, sorted by length, on one replica; loading the model is left out. Every variant runs
in a process of its own, the rounds are interleaved, and the ratio is that of the medians.

    python benchmarks/embed_overhead.py --items store/catalog/KEY/items.parquet --model minilm --rows 4000
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow.parquet as pq

from genrec_dist.artifacts.files import read_json
from genrec_dist.config import RuntimeConfig, SemanticConfig
from genrec_dist.semantic.encoders import resolve_model
from genrec_dist.semantic.engine import create_engine
from genrec_dist.semantic.text import FIELDS, item_texts

VARIANTS = ("vllm loop", "stage", "sentence-transformers loop", "transformers loop")
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=Path, required=True)
    parser.add_argument("--model", default="minilm", help="minilm or a folder")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(run_variant(args.variant, args)))
        return
    speeds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(args.rounds):
        for name in VARIANTS:
            output = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--variant", name],
                capture_output=True,
                text=True,
                check=False,
            )
            if output.returncode:
                sys.exit(f"{name} failed:\n{output.stderr[-3000:]}")
            found = json.loads(output.stdout.strip().splitlines()[-1])
            rows, tokens = found["rows"] / found["seconds"], found["tokens"] / found["seconds"]
            speeds[name].append(rows)
            print(f"{name:<28}{rows:>9.1f} rows/s  {tokens:>9.0f} tokens/s", flush=True)
    base = median(speeds["vllm loop"])
    print(f"\n{args.model}, {args.rows} rows, {args.threads} threads, median of {args.rounds}")
    for name, values in speeds.items():
        each = ", ".join(f"{value:.1f}" for value in values)
        print(f"{name:<28}{median(values):>9.1f} rows/s  {median(values) / base:>6.2f} x bare vLLM loop  ({each})")


def run_variant(name: str, args: argparse.Namespace) -> dict:
    """Rows, tokens and seconds of one variant."""
    table = pq.read_table(args.items).slice(0, args.rows)
    settings = SemanticConfig(engine="vllm", model=args.model, pooling="mean", normalize=False)
    if name == "stage":
        return run_stage(table, settings, args)
    source = resolve_model(settings)
    texts, _ = item_texts(table.select(list(FIELDS)), settings.template)
    engine = None
    if name == "vllm loop":
        engine = create_engine(settings, "cpu", args.threads)
        ids, _ = engine.tokenizer(texts)
    else:
        import torch
        from transformers import AutoTokenizer

        torch.set_num_threads(args.threads)
        ids = AutoTokenizer.from_pretrained(source.path)(texts, truncation=True, max_length=settings.max_tokens)[
            "input_ids"
        ]
    lengths = np.array([len(row) for row in ids])
    order = np.argsort(-lengths, kind="stable")
    ordered = [texts[n] for n in order]
    call = {
        "vllm loop": vllm_loop,
        "sentence-transformers loop": sentence_transformers_loop,
        "transformers loop": transformers_loop,
    }[name]
    embed = call(source.path, settings, engine)
    embed(ordered[-BATCH:])  # warm-up
    began = time.perf_counter()
    embed(ordered)
    return {"rows": len(texts), "tokens": int(lengths.sum()), "seconds": time.perf_counter() - began}


def vllm_loop(folder: str, settings: SemanticConfig, engine):
    limits = {"truncation": True, "max_length": engine.tokenizer.max_tokens}
    return lambda texts: np.array(
        [o.outputs.embedding for o in engine.llm.embed(texts, use_tqdm=False, tokenization_kwargs=limits)], np.float32
    )


def sentence_transformers_loop(folder: str, settings: SemanticConfig, engine):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")
    model.max_seq_length = settings.max_tokens
    if model.tokenizer.pad_token is None:
        model.tokenizer.pad_token = model.tokenizer.eos_token
    return lambda texts: model.encode(texts, batch_size=BATCH, show_progress_bar=False)


def transformers_loop(folder: str, settings: SemanticConfig, engine):
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).float().eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"

    def embed(texts: list[str]) -> list:
        out = []
        for first in range(0, len(texts), BATCH):
            batch = tokenizer(
                texts[first : first + BATCH],
                padding=True,
                truncation=True,
                max_length=settings.max_tokens,
                return_tensors="pt",
            )
            with torch.inference_mode():
                hidden = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
                mask = batch["attention_mask"].unsqueeze(-1).float()
                out.append(((hidden * mask).sum(1) / mask.sum(1)).numpy())
        return out

    return embed


def run_stage(table, settings: SemanticConfig, args: argparse.Namespace) -> dict:
    """The stage as `genrec run` calls it, its own clock: from the first shard's start to the last one's end."""
    from genrec_dist.cluster import leave_ray
    from genrec_dist.pipeline import StageContext
    from genrec_dist.semantic.stage import embed_catalog

    with tempfile.TemporaryDirectory() as root:
        catalog, out = Path(root) / "catalog", Path(root) / "out"
        catalog.mkdir()
        out.mkdir()
        pq.write_table(table, catalog / "items.parquet")
        runtime = RuntimeConfig(backend="ray", device="cpu", num_threads=args.threads)
        embed_catalog(StageContext(out=out, inputs={"catalog": catalog}, runtime=runtime), settings)
        leave_ray()
        report = read_json(out / "report.json")
    timing = report["timing"]
    return {"rows": timing["items"], "tokens": timing["tokens"], "seconds": timing["seconds"]}


if __name__ == "__main__":
    main()
