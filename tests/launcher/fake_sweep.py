"""The real `genrec` command over fake stages, for sweeps: what a trial does is chosen by files in the working folder.

`hang-DEPTH`: its model stage reports progress and waits to be stopped, while the file exists. `fail-DEPTH`: it raises.
With `child` as the first argument: the child process of a unit. Stages: catalog (shared) -> generator -> evaluation.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import fake_cli

from genrec_dist.artifacts.files import append_jsonl, write_json
from genrec_dist.config import Config
from genrec_dist.errors import DataError
from genrec_dist.pipeline import Stage, StageContext


def catalog(context: StageContext) -> None:
    from genrec_dist.testing.tiny import tiny_sequences, write_tiny_catalog

    append_jsonl(Path("built.jsonl"), {"stage": "catalog"})
    write_tiny_catalog(context.out, tiny_sequences())


def build_stages(config: Config) -> list[Stage]:
    depth = config.generator.num_decoder_layers

    def model(context: StageContext) -> None:
        append_jsonl(Path("built.jsonl"), {"stage": f"model-{depth}"})
        if Path(f"fail-{depth}").exists():
            raise DataError("made to fail", where=f"depth {depth}")
        context.progress(1, 4, "steps", epoch=0.25)
        while Path(f"hang-{depth}").exists():
            time.sleep(0.05)
        append_jsonl(
            context.out / "curves.jsonl",
            {"split": "valid", "step": 4, "epoch": 1, "flops": 1e9 * depth, "bits_per_item": 8 - depth / 10},
        )
        counts = {"total": 100 + depth, "non_embedding": 10 * depth, "layers": 5 * depth}
        write_json(context.out / "summary.json", {"best_step": 4, "num_parameters": counts})

    first = Stage("catalog", 1, {}, {}, catalog)
    second = Stage("generator", 1, {"depth": depth, "seed": config.seed}, {"catalog": first}, model)
    return [first, second, Stage("evaluation", 1, {}, {"generator": second}, fake_cli.plain)]


def child_command(folder: str, name: str, runtime: dict) -> list[str]:
    import os

    return [sys.executable, __file__, "child", folder, name, str(os.getpid()), json.dumps(runtime)]


if __name__ == "__main__":
    fake_cli.build_stages = build_stages
    fake_cli.install()
    if sys.argv[1] == "child":
        from launcher.sweep_child import main as child

        sys.exit(child(sys.argv[2:]))
    import genrec_dist.studies

    del sys.modules["genrec_dist.studies.report"], genrec_dist.studies.report  # the sweep's own report is the real one
    from launcher import sweep
    from launcher.cli import main

    sweep.child_command = child_command
    main()
