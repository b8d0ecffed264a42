"""The real command line over fake stages, as a script: what a stage does is chosen by the run's name.

Stages: catalog -> model -> evaluation. The fakes stand in for methods, report and recommendation only.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

from genrec_dist.artifacts.files import append_jsonl, write_json
from genrec_dist.config import Config
from genrec_dist.errors import DataError
from genrec_dist.pipeline import Stage, StageContext
from genrec_dist.runs import RunFolder
from genrec_dist.training.watchdog import Watchdog
from genrec_dist.training.worker import Worker

METRICS = {f"{metric}@{k}": k / 100 for metric in ("recall", "ndcg") for k in (5, 10, 20)}


def catalog(context: StageContext) -> None:
    write_json(context.out / "stats.json", {"num_items": 3})


def plain(context: StageContext) -> None:
    for done in range(4):
        context.progress(done, 4, "steps", epoch=done / 2)
    append_jsonl(context.out / "curves.jsonl", {"split": "train", "step": 4, "loss": 0.5})


def noisy(context: StageContext) -> None:
    print("NOISE print")
    print("NOISE stderr", file=sys.stderr)
    os.write(1, b"NOISE descriptor 1\n")
    os.write(2, b"NOISE descriptor 2\n")
    subprocess.run(["sh", "-c", "echo NOISE child; echo NOISE child stderr >&2"], check=True)
    logging.getLogger("fake").warning("NOISE logging")
    warnings.warn("NOISE warning", stacklevel=1)


def data_error(context: StageContext) -> None:
    raise DataError("too many broken lines", where="reviews.json.gz", got="7%", expected="1%", fix="look at the ledger")


def bug(context: StageContext) -> None:
    raise ZeroDivisionError("division by zero")


def hangs(context: StageContext) -> None:
    """A training in this process that makes three steps and then nothing."""
    with Watchdog(context, Worker()) as watchdog:
        watchdog.step_done(3)
        time.sleep(60)


def slow(context: StageContext) -> None:
    """Reports progress, leaves a checkpoint and waits to be stopped; goes on at once when it finds one."""
    if (context.scratch / "checkpoint").exists():
        write_json(context.out / "continued.json", {})
        return
    (context.scratch / "checkpoint").write_text("step 1")
    append_jsonl(context.out / "curves.jsonl", {"split": "train", "step": 1, "loss": 0.25})
    context.progress(1, 4, "steps", epoch=0.25)
    time.sleep(120)


def takes_over_signals(context: StageContext) -> None:
    """As Ray does: its own handlers, which end the process with codes that say something else."""
    signal.signal(signal.SIGINT, lambda number, frame: sys.exit(0))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    context.progress(1, 4, "steps")
    time.sleep(120)


BUILDS = {f.__name__: f for f in (plain, noisy, data_error, bug, hangs, slow, takes_over_signals)}


def build_stages(config: Config) -> list[Stage]:
    first = Stage("catalog", 1, {}, {}, catalog)
    model = Stage("model", 1, {"name": config.name, "seed": config.seed}, {"catalog": first}, BUILDS[config.name])
    return [first, model, Stage("evaluation", 1, {}, {"model": model}, plain)]


def collect_metrics(config: Config, run: RunFolder) -> dict:
    return {"method": "fake", "main": {"test": METRICS, "users": 3}, "references": {"popularity": {"test": METRICS}}}


def write_report(run: RunFolder) -> Path:
    print("NOISE report")
    (run.path / "report.html").write_text("<html>")
    return run.path / "report.html"


def recommend(run: RunFolder, history: list[str], top_k: int, device: str = "auto") -> list[dict]:
    print("NOISE recommend")
    return [
        {"item_id": f"B{i}", "title": f"after {history[-1]}", "score": -float(i), "item_index": i} for i in range(top_k)
    ]


def install() -> None:
    """Put the fakes where the launcher looks."""
    fakes = {
        "genrec_dist.methods": (build_stages, collect_metrics),
        "genrec_dist.studies.report": (write_report,),
        "genrec_dist.generator.recommend": (recommend,),
    }
    for name, functions in fakes.items():
        module = types.ModuleType(name)
        for function in functions:
            setattr(module, function.__name__, function)
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        setattr(__import__(parent, fromlist=["_"]), leaf, module)


if __name__ == "__main__":
    install()
    from launcher.cli import main

    main()
