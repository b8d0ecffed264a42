"""Frozen recipes: `configs/frozen/prorec_<data set>_<order>.yaml`, the settings behind our numbers beside
the paper's.

A recipe is an ordinary configuration whose comment at the top says how it was measured: command, date, hardware, commit
and result. Reads files only; what a recipe gives is run by `genrec reproduce`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from genrec_dist.errors import ConfigError
from genrec_dist.studies.paper import METRICS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ORDERS = ("time", "file")
FIELDS = ("command", "date", "hardware", "commit", "result")
NOT_RUN = "not yet run"
MEASURED = re.compile(r"(recall|ndcg)@(\d+) (\d?\.\d+) ± (\d?\.\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Recipe:
    """The comment at the top of a frozen recipe.

    Args:
        path: the configuration.
        command: that measured it, or will.
        date: ISO date, None before the first measurement; so are the next ones.
        hardware: processor or GPU.
        commit: of this project.
        result: (mean, standard deviation over three seeds) by metric.
    """

    path: Path
    command: str
    date: str | None
    hardware: str | None
    commit: str | None
    result: dict[str, tuple[float, float]] | None


def config_file(name: str) -> Path:
    """A file below `configs/`: of the folder the command was called in, else the one beside the program."""
    here = Path("configs") / name
    return here if here.is_file() else CONFIGS / name


def find_recipe(data_set: str, order: str) -> Path:
    """File of the frozen recipe of a data set and an order of interactions."""
    return config_file(f"frozen/prorec_{data_set}_{order}.yaml")


def read_recipe(path: Path) -> Recipe:
    """Parse the comment at the top of a frozen recipe.

    Raises:
        ConfigError: a field is missing or malformed, or only some of them are filled in.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = [line[1:].strip() for line in lines if line.startswith("#")]
    found = {key: value for line in comment for key, _, value in [line.partition(": ")] if key in FIELDS}
    missing = [field for field in FIELDS if not found.get(field)]
    if missing:
        raise _malformed(path, f"no {', '.join(missing)}", f"lines '# FIELD: ...' for {', '.join(FIELDS)}")
    if not found["command"].startswith("genrec "):
        raise _malformed(path, f"command: {found['command']}", "a genrec command")
    pending = [field for field in FIELDS[1:] if found[field] == NOT_RUN]
    if pending and len(pending) < len(FIELDS) - 1:
        raise _malformed(path, f"'{NOT_RUN}' in {', '.join(pending)} only", "all of them filled in, or none")
    if pending:
        return Recipe(path, found["command"], None, None, None, None)
    try:
        date.fromisoformat(found["date"])
    except ValueError:
        raise _malformed(path, f"date: {found['date']}", "YYYY-MM-DD") from None
    if not re.fullmatch(r"[0-9a-f]{7,40}", found["commit"]):
        raise _malformed(path, f"commit: {found['commit']}", "7 to 40 hexadecimal digits")
    result = {
        f"{kind.lower()}@{k}": (float(mean), float(deviation))
        for kind, k, mean, deviation in MEASURED.findall(found["result"])
    }
    if set(result) != set(METRICS):
        raise _malformed(path, f"result: {found['result']}", f"'{METRICS[0]} 0.0939 ± 0.0005' for {', '.join(METRICS)}")
    return Recipe(path, found["command"], found["date"], found["hardware"], found["commit"], result)


def _malformed(path: Path, got: str, expected: str) -> ConfigError:
    return ConfigError("header of a frozen recipe is not complete", where=path, got=got, expected=expected)
