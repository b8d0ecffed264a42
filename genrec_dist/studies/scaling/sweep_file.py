"""The sweep file: arms, depths, seeds, and lists or grids over configuration keys. YAML fills it, code decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from genrec_dist.config import check_name
from genrec_dist.errors import ConfigError


class Arm(BaseModel):
    """One system of the sweep."""

    model_config = ConfigDict(extra="forbid")

    config: str = Field(description="its configuration; a relative path goes from the sweep file")
    set: dict[str, Any] = Field({}, description="settings by dotted key, after the sweep's own")


class SweepFile(BaseModel):
    """What a sweep runs: arms x depths x seeds x (points and grid)."""

    model_config = ConfigDict(extra="forbid")

    title: str = Field("", description="of the report; default: the sweep's name")
    arms: dict[str, Arm] = Field(min_length=1)
    set: dict[str, Any] = Field({}, description="settings of every arm, by dotted key")
    depths: list[int] = Field([], description="layers; empty: those of each configuration")
    ladder: Literal["fixed_width", "co_scaled"] = Field("fixed_width", description="what else follows from the depth")
    seeds: list[int] = Field([0], min_length=1)
    grid: dict[str, list[Any]] = Field({}, description="values by dotted key; every combination is run")
    points: list[dict[str, Any]] = Field([], description="explicit settings by dotted key; each is run with the grid")

    @field_validator("depths", "seeds")
    @classmethod
    def _distinct(cls, value: list[int], info: Any) -> list[int]:
        least = 1 if info.field_name == "depths" else 0
        if len(set(value)) < len(value) or min(value, default=least) < least:
            raise ValueError(f"different numbers from {least} on")
        return value

    @model_validator(mode="after")
    def _values(self) -> SweepFile:
        for key, values in self.grid.items():
            if not values or any(a == b and type(a) is type(b) for i, a in enumerate(values) for b in values[:i]):
                raise ValueError(f"grid.{key} needs different values, at least one")
        for name in self.arms:
            check_name(name, f"arms.{name}")
        return self


def load_sweep(path: Path) -> SweepFile:
    """Read and check a sweep file; its configurations are read by `plan.make_plan`.

    Raises:
        ConfigError: missing file, not YAML, unknown key or bad value, every one listed.
    """
    if not path.is_file():
        raise ConfigError("no such sweep file", where=path, fix="see configs/sweeps/ for examples")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return SweepFile.model_validate(values)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("sweep file is not YAML", where=path, got=str(error)) from error
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or '(whole)'}: {e['msg']}" for e in error.errors()]
        raise ConfigError(
            "sweep file is not valid",
            where=path,
            got="\n       ".join(problems),
            expected=f"keys {', '.join(SweepFile.model_fields)}; of an arm {', '.join(Arm.model_fields)}",
        ) from None
