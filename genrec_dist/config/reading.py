"""Reading, checking and writing configurations: YAML files, and settings such as fusion.dim=64."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from genrec_dist.config.run import Config
from genrec_dist.errors import ConfigError
from genrec_dist.safe_yaml import parse_yaml, read_yaml


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration, sections included."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        inner = _section_of(field.annotation)
        if inner is not None:
            keys += known_keys(inner, f"{prefix}{name}.")
    return keys


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def nearest_key(key: str) -> str | None:
    """The known dotted key most like `key`, or None."""
    keys = known_keys()
    by_leaf = difflib.get_close_matches(key.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in keys], 1, 0.6)
    close = difflib.get_close_matches(key, keys, 1, 0.6)
    if close:
        return close[0]
    if by_leaf:
        return next(k for k in keys if k.rsplit(".", 1)[-1] == by_leaf[0])
    return None


def parse_override(text: str) -> tuple[str, Any]:
    """Split 'a.b=value'; the value is read as YAML.

    Raises:
        ConfigError: no '=' or the value is not YAML.
    """
    key, sep, raw = text.partition("=")
    if not sep or not key.strip():
        raise ConfigError("not a setting", where="--set", got=text, expected="section.key=value")
    try:
        return key.strip(), parse_yaml(raw, f"--set {key}")
    except ConfigError as error:
        raise ConfigError("value is not YAML", where=f"--set {key}", got=raw[:200], fix="quote it") from error


def merge_setting(base: dict, key: str, value: Any) -> None:
    """Set the value of a dotted key in nested mappings, in place.

    Raises:
        ConfigError: a part of the key before the last one is no section.
    """
    parts = key.split(".")
    for part in parts[:-1]:
        nested = base.setdefault(part, {})
        if not isinstance(nested, dict):
            raise ConfigError("not a section", where=key, got=nested, expected="a mapping")
        base = nested
    base[parts[-1]] = value


def build_config(values: dict, overrides: list[str] | None = None, where: str = "config") -> Config:
    """Validate a mapping (plus 'a.b=c' overrides) into a Config.

    Raises:
        ConfigError: unknown key (dotted path and nearest name) or bad value, every one listed.
    """
    values = _copy(values)
    for text in overrides or []:
        merge_setting(values, *parse_override(text))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"]) or "(whole)"
            if item["type"] == "extra_forbidden":
                near = nearest_key(key)
                problems.append(f"{key}: unknown key" + (f"; nearest: {near}" if near else ""))
            else:
                problems.append(f"{key}: {item['msg']}; got {item.get('input')!r:.200}")
        raise ConfigError(
            "configuration is not valid",
            where=where,
            got="\n       ".join(problems),
            fix="`genrec config show CONFIG` prints every key with its value",
        ) from None


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return list(value) if isinstance(value, list) else value


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file and validate it.

    Raises:
        ConfigError: missing file, not YAML, not a mapping, unknown key or bad value.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError("no such configuration file", where=path, fix="see configs/ for examples")
    values = read_yaml(path)
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError("configuration is not a mapping", where=path, got=type(values).__name__)
    values.setdefault("name", path.stem)
    return build_config(values, overrides, where=str(path))


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
