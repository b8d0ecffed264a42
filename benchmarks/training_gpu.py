"""Training the generator on a GPU: tokens a second, utilisation, an epoch of Beauty's size.

    python -m benchmarks.training_gpu epoch            # 131k prefixes, 1 + 4 layers, several ways to make a step
    python -m benchmarks.training_gpu profile --modes graph --batches 1024 --which 4
    python -m benchmarks.training_gpu profile --modes graph --batches 8192 --which wide --depth-buckets
    python -m benchmarks.training_gpu depths           # depths 1, 4, 32 at width 128, and width 1024 with 24 layers

Every figure is of the project's own loop (`training.loop.train`), data and logging included, validation left out; the
first epoch, in which graphs are captured, is not counted. Utilisation is of model FLOPs without padding, against a
product of matrices measured in the same process. ZeRO on several GPUs: `zero_gpu`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.device_rates import matmul_rate
from genrec_dist.artifacts.files import read_jsonl
from genrec_dist.config import OptimConfig, RuntimeConfig
from genrec_dist.generator.gpt_stage import GptTask
from genrec_dist.generator.stage import GeneratorTask
from genrec_dist.pipeline import StageContext
from genrec_dist.testing.beauty_shape import beauty_generator, beauty_gpt, beauty_sequences
from genrec_dist.training.engine import make_engine
from genrec_dist.training.loop import train
from genrec_dist.training.losses import LossMeter
from genrec_dist.training.worker import Worker, plain_worker, setup_torch

WIDE = {"dim": 1024, "num_heads": 16, "num_decoder_layers": 24}
WIDE_GPT = {"dim": 1024, "num_heads": 16, "num_layers": 24}
SETTINGS = {"seed": 0, "validation_beam": 10, "validation_users": 64, "mix_weight": 0.0}


def make_task(config: OptimConfig, worker: Worker, **model) -> tuple:
    """PRORec's generator, or with `num_layers` CSJ-ID's, and its task."""
    if "num_layers" in model:
        gpt = beauty_gpt(config, **model).to(worker.device)
        return gpt, GptTask(gpt, beauty_sequences(), worker, SETTINGS)
    generator = beauty_generator(config, **model).to(worker.device)
    return generator, GeneratorTask(generator, beauty_sequences(), worker, SETTINGS)


def measure(worker: Worker, epochs: int, optim: dict, runtime: dict, **model) -> dict:
    """Train for some epochs; rates of all but the first."""
    config = OptimConfig(epochs=epochs, evaluate_every=epochs, patience=99, **optim)
    settings = RuntimeConfig(backend="local", num_workers=worker.world_size, checkpoint_minutes=0, **runtime)
    generator, task = make_task(config, worker, **model)
    parameters = sum(p.numel() for p in generator.parameters() if p.requires_grad)  # ZeRO 3 leaves none here
    torch.cuda.reset_peak_memory_stats()
    engine = make_engine(generator, config, worker, settings)
    with tempfile.TemporaryDirectory() as folder:
        context = StageContext(Path(folder), {}, settings)
        clock: list[float] = []
        per_epoch = task.order.steps_per_epoch

        def note(step: int) -> None:
            if (step + 1) % per_epoch == 0:
                torch.cuda.synchronize()
                clock.append(time.perf_counter())

        train(task, engine, config, worker, context, seed=0, after_step=note, checkpoint_epochs=epochs + 1)
        lines = [r for r in read_jsonl(Path(folder) / "curves.jsonl") if r["split"] == "train" and r["epoch"] > 1]
    count = max(len(lines), 1)
    mean = lambda name: sum(line[name] for line in lines) / count  # noqa: E731
    return {
        "steps": per_epoch,
        "epoch_seconds": min(b - a for a, b in pairwise(clock)) if len(clock) > 1 else float("nan"),
        "tokens_per_second": mean("tokens_per_second"),
        "mfu": mean("mfu"),
        "held_gib": torch.cuda.memory_allocated() / 2**30,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "loss": lines[-1]["loss"] if lines else float("nan"),
        "parameters": parameters,
    }


def show(label: str, found: dict, worker: Worker) -> None:
    if worker.is_main:
        print(
            f"{label:58s} {found['steps']:5d} steps  epoch {found['epoch_seconds']:7.3f} s  "
            f"{found['tokens_per_second'] / 1e3:8.1f}k tokens/s  mfu {found['mfu']:.3f}  "
            f"{found['memory_gib']:6.2f} GiB  loss {found['loss']:.4f}  {found['parameters'] / 1e6:.1f}M",
            flush=True,
        )


def epoch(worker: Worker, modes: list[str], batches: list[int], epochs: int) -> None:
    """One epoch of 131k prefixes, 1 + 4 layers, width 128."""
    for batch_size in batches:
        for mode in modes:
            found = measure(worker, epochs, {"batch_size": batch_size}, {"step_mode": mode})
            show(f"1 + 4 layers, width 128, batch {batch_size}, {mode}", found, worker)


def profile(worker: Worker, modes: list[str], batch_size: int, which: str, by_depth: bool, number: int) -> None:
    """Where the GPU's time goes: kernels of four steps by their total time, over batches of one width."""
    shape = {"wide": WIDE, "wide-gpt": WIDE_GPT}.get(which, {}) | ({"depth_buckets": True} if by_depth else {})
    for mode in modes:
        config = OptimConfig(batch_size=batch_size, length_buckets=16 * bool(shape))
        generator, task = make_task(config, worker, **shape)
        engine = make_engine(generator, config, worker, RuntimeConfig(backend="local", step_mode=mode))
        meter = LossMeter(worker)
        generator.train()
        batch = task.batch(task.order.batch(number), worker)

        def steps(count: int, engine=engine, batch=batch, meter=meter) -> None:
            for _ in range(count):
                engine.advance([batch], 1e-3, meter, lambda index: None)
            torch.cuda.synchronize()

        steps(40)
        begun = time.perf_counter()
        steps(4)
        spent = (time.perf_counter() - begun) / 4 * 1e3
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            steps(4)
        events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
        total, count = sum(e.self_device_time_total for e in events) / 4e3, sum(e.count for e in events) // 4
        flops = task.flops(task.order.batch(number)) / (spent / 1e3) / 1e12
        width = batch["history"].shape[1]
        line = (
            f"{mode}, batch {batch_size} x {width}, {batch.get('levels', 'all')} levels: "
            f"{spent:.2f} ms a step, {total:.2f} ms of {count} kernels, "
            f"{flops:.0f} model TFLOP/s, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        )
        for event in events[:16]:
            print(
                f"  {event.self_device_time_total / 4e3:9.3f} ms {event.count // 4:6d} x  {event.key[:120]}", flush=True
            )
        print(line, flush=True)


def depths(worker: Worker, modes: list[str], which: list[str], epochs: int, wide_batch: int) -> None:
    """Depths at width 128, and a wide model."""
    shapes = {
        "1": ({"num_decoder_layers": 1}, 1024),
        "4": ({"num_decoder_layers": 4}, 1024),
        "32": ({"num_decoder_layers": 32}, 1024),
        "wide": (WIDE, wide_batch),
        "wide-gpt": (WIDE_GPT, max(wide_batch // 8, 1)),
    }
    for name in which:
        shape, batch_size = shapes[name]
        for mode in modes:
            found = measure(
                worker, epochs, {"batch_size": batch_size, "length_buckets": 16}, {"step_mode": mode}, **shape
            )
            show(f"{name}: {shape}, batch {batch_size}, {mode}", found, worker)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["epoch", "depths", "profile"])
    parser.add_argument("--modes", nargs="+", default=["eager", "graph", "compile"])
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--which", nargs="+", default=["1", "4", "32", "wide", "wide-gpt"])
    parser.add_argument("--wide-batch", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--depth-buckets", action="store_true", help="profile: batches of like code length")
    parser.add_argument("--number", type=int, default=5, help="profile: of the batch")
    given = parser.parse_args()
    worker = plain_worker(RuntimeConfig(backend="local"))
    setup_torch(worker, 4)
    if worker.is_main:
        rate = matmul_rate(torch.bfloat16, worker.device) / 1e12
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16 product {rate:.0f} TFLOP/s", flush=True)
    if given.what == "epoch":
        epoch(worker, given.modes, given.batches, given.epochs)
    elif given.what == "profile":
        profile(worker, given.modes, given.batches[0], given.which[0], given.depth_buckets, given.number)
    else:
        depths(worker, given.modes, given.which, given.epochs, given.wide_batch)


if __name__ == "__main__":
    main()
