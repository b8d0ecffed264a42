"""Weak scaling and memory of ZeRO on GPUs of one host: steps of the wide encoder-decoder (423M parameters).

    python -m benchmarks.zero_gpu --gpus 2                 # everything, in a minute and a half
    python -m benchmarks.zero_gpu --gpus 2 --host-profile  # and where the host's time goes
    python -m benchmarks.zero_gpu --gpus 2 --variants stage1 stage3

Two processes first measure one GPU, side by side on two: the captured torch engine, and ZeRO 1. Then N processes
measure the variants. A step is of 4,096 samples a GPU, always the same ones, without data and logging. Efficiency is
tokens a second and GPU over those of one GPU. Memory stands beside the formula of `studies.sizes`.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import gc
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from genrec_dist.config import OptimConfig, RuntimeConfig
from genrec_dist.generator.model import Generator
from genrec_dist.generator.stage import GeneratorTask
from genrec_dist.generator.transformer import init_weights
from genrec_dist.studies.memory import training_memory
from genrec_dist.studies.sizes import ModelSize
from genrec_dist.testing.beauty_shape import beauty_generator, beauty_sequences
from genrec_dist.training import deepspeed_engine
from genrec_dist.training.engine import make_engine
from genrec_dist.training.losses import LossMeter
from genrec_dist.training.worker import Worker, plain_worker, setup_torch

SETTINGS = {"seed": 0, "validation_beam": 10, "validation_users": 64, "mix_weight": 0.0}
BUCKETS = {"reduce_bucket_size": 200_000_000, "prefetch_bucket_size": 200_000_000, "allgather_bucket_size": 200_000_000}
ONE_GPU = {
    "torch, captured": {"engine": "torch"},
    "stage1": {"zero_stage": 1},
}
VARIANTS: dict[str, dict] = {
    "torch, captured": {"engine": "torch"},
    "stage0": {"zero_stage": 0},
    "stage1": {"zero_stage": 1},
    "stage2": {"zero_stage": 2},
    "stage3": {"zero_stage": 3},
    "stage3, large buckets": {"zero_stage": 3, "deepspeed": BUCKETS},
    "stage3, no prefetch": {"zero_stage": 3, "deepspeed": {"prefetch_bucket_size": 0}},
    "stage3, by module": {"zero_stage": 3, "flat": False},
    "stage3, bf16 gathers": {"zero_stage": 3, "deepspeed": {"gather_dtype": "bf16"}},
}
WARM_UP, STEPS = 6, 6


@cache
def sequences():
    return beauty_sequences()


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Weights of new modules stay what the memory held: drawing 423M on a CPU takes half a minute."""
    with contextlib.ExitStack() as stack:
        for name in ("normal_", "uniform_", "kaiming_uniform_"):
            stack.enter_context(mock.patch.object(nn.init, name, lambda tensor, *_, **__: tensor))
        yield


def wide_model(config: OptimConfig, worker: Worker, shape: dict) -> Generator:
    """The wide generator on its device; all but the embeddings that Stage I gives drawn there."""
    with undrawn():
        model = beauty_generator(config, **shape).to(worker.device)
    for name, module in model.named_modules():
        if name not in ("item", "head.nodes"):
            init_weights(module)
    nn.init.normal_(model.bos, std=0.02)
    return model


def measure(name: str, settings: dict, worker: Worker, given: argparse.Namespace) -> dict:
    """Times and memory of one variant."""
    settings = {"engine": "deepspeed"} | settings
    flat = settings.pop("flat", True)
    runtime = RuntimeConfig(backend="local", num_workers=worker.world_size, **settings)
    config = OptimConfig(batch_size=given.per_gpu, length_buckets=16, precision="bf16")
    shape = {"dim": given.dim, "num_heads": 16, "num_decoder_layers": given.layers}
    on_gpu = worker.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    model = wide_model(config, worker, shape)
    alone = Worker(device=worker.device)  # every GPU makes the same batch: weak scaling without chance
    task = GeneratorTask(model, sequences(), alone, SETTINGS)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with contextlib.nullcontext() if flat else mock.patch.object(deepspeed_engine, "transformer_layers", no_layers):
        engine = make_engine(model, config, worker, runtime)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    model.train()
    indices = task.order.batch(5)
    batch, meter = task.batch(indices, alone), LossMeter(worker)

    def steps(count: int) -> float:
        sync(worker)
        begun = time.perf_counter()
        for _ in range(count):
            engine.advance([batch], 1e-4, meter, lambda index: None)
        sync(worker)
        return (time.perf_counter() - begun) / count

    steps(WARM_UP)
    spent = min(steps(STEPS // 2) for _ in range(2))
    if given.host_profile and worker.is_main:
        found = cProfile.Profile()
        found.enable()
    steps(STEPS // 2)
    if given.host_profile and worker.is_main:
        found.disable()
        print(f"--- {name}", flush=True)
        pstats.Stats(found, stream=sys.stdout).sort_stats("tottime").print_stats(25)
    gib = 2**30
    held = torch.cuda.memory_allocated() - before if on_gpu else 0
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    kinds = training_memory(ModelSize({"all": parameters}), 0, runtime, zero=runtime.engine == "deepspeed")
    states = sum(kinds.values())
    result = {
        "name": name,
        "gpus": worker.world_size,
        "ms": spent * 1e3,
        "tokens": task.tokens(indices) / spent,
        "tflops": task.flops(indices) / spent / 1e12,
        "held": held / gib,
        "held_formula": (states - kinds["gradients"]) / gib,
        "states_formula": states / gib,
        "peak": peak / gib,
        "loss": meter.read()["loss"],
        "shape": list(batch.get("parts", [batch])[-1]["history"].shape),
        "parameters": parameters,
    }
    forget(engine)
    return result


def no_layers(model: nn.Module) -> dict:
    """In place of `transformer_layers`: DeepSpeed sees all modules and parameters."""
    return {}


def sync(worker: Worker) -> None:
    if worker.device.type == "cuda":
        torch.cuda.synchronize()
    worker.barrier()


def forget(engine) -> None:
    """Free what an engine holds on the device; DeepSpeed keeps itself alive."""
    tensors = list(engine.model.parameters()) + list(engine.model.buffers())
    if hasattr(engine, "engine"):
        from deepspeed.runtime.zero import parameter_offload

        engine.engine.destroy()
        parameter_offload.FWD_MODULE_STACK.clear()
    for tensor in tensors:
        tensor.data = tensor.data.new_empty(0)
        tensor.grad = None
    vars(engine).clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def show(result: dict, one_gpu: dict[str, dict]) -> None:
    shares = [
        f"{result['tokens'] / one_gpu[name]['tokens']:.2f} of one GPU's {name}" for name in ONE_GPU if name in one_gpu
    ]
    r = result
    print(
        f"{r['name']:22s} {r['gpus']} GPUs  {r['ms']:7.1f} ms  {r['tokens'] / 1e3:6.1f}k tokens/s a GPU"
        f"  {r['tflops']:4.0f} TFLOP/s  held {r['held']:5.2f} (formula {r['held_formula']:5.2f})"
        f"  states {r['states_formula']:5.2f}  peak {r['peak']:5.2f} GiB  loss {r['loss']:.3f}"
        f"  {' '.join(map(str, r['shape']))}  {'; '.join(shares)}",
        flush=True,
    )


def work(given: argparse.Namespace) -> None:
    """One process of a group: measure the variants; rank 0 prints them, and writes them to the folder."""
    worker = plain_worker(RuntimeConfig(backend="local"))
    setup_torch(worker, 4)
    begun = time.perf_counter()
    folder = Path(given.folder)
    one_gpu = {r["name"]: r for f in folder.glob("one-*.json") for r in json.loads(f.read_text())}
    results = []
    for name in given.variants:
        try:
            results.append(measure(name, (VARIANTS | ONE_GPU)[name], worker, given))
        except torch.cuda.OutOfMemoryError as error:
            print(f"{name}: {error}", flush=True)
            break
        if worker.is_main:
            show(results[-1], one_gpu | {r["name"]: r for r in results if worker.world_size == 1})
    if worker.is_main:
        (folder / f"{given.label}.json").write_text(json.dumps(results))
        print(f"{given.label}: {time.perf_counter() - begun:.0f} s behind the start", flush=True)


def start(given: argparse.Namespace, gpus: list[int], names: list[str], folder: str, label: str) -> subprocess.Popen:
    """A group of processes, one a GPU."""
    own = ["--folder", folder, "--label", label, "--per-gpu", str(given.per_gpu), "--layers", str(given.layers)]
    own += ["--dim", str(given.dim), *(["--host-profile"] if given.host_profile else []), "--variants", *names]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(len(gpus))]
    seen = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if torch.cuda.is_available() else {}
    return subprocess.Popen([*run, "-m", "benchmarks.zero_gpu", *own], env=os.environ | seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--per-gpu", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--host-profile", action="store_true")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--label", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.folder:
        work(given)
        return
    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pairs = list(enumerate(ONE_GPU))
        alone = [start(given, [gpu % given.gpus], [name], folder, f"one-{gpu}") for gpu, name in pairs]
        codes = [process.wait() for process in alone]
        codes.append(start(given, list(range(given.gpus)), given.variants, folder, "all").wait())
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main()
