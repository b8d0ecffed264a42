"""A run's generator as a folder that needs no run."""

from __future__ import annotations

import math
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from genrec_dist.runs import RunFolder
from launcher.embeddings import new_folder


def export_model(run: RunFolder, out: Path, console: Console) -> None:
    """Write the generator to `out`, whole or not at all, and say what it is.

    Raises:
        ConfigError: `out` is there already and is not empty, or the run has no trained generator.
        ArtifactError: one of the run's artifacts is damaged.
    """
    from genrec_dist.generator.export import export_run

    with new_folder(out, "export", run.path.name) as building:
        record = export_run(run, building)
    count = sum(math.prod(shape) for shape in record["shapes"].values())
    console.print(
        f"wrote {escape(str(out))}: {record['method']}, {count:,} parameters, {record['num_items']:,} items, codes of "
        f"{record['max_depth']} levels",
        soft_wrap=True,
    )
