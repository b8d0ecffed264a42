"""YAML from outside, read within limits: size, depth, and what aliases expand to. Plain values only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from genrec_dist.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 100_000


def read_yaml(path: Path) -> Any:
    """Values of a YAML file.

    Raises:
        ConfigError: not YAML, or beyond the limits of a configuration.
    """
    with open(path, "rb") as handle:
        data = handle.read(MAX_BYTES + 1)
    try:
        return parse_yaml(data.decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError("configuration is not YAML", where=path, got=str(error)) from error


def parse_yaml(text: str, where: str) -> Any:
    """Values of a text; errors as of `read_yaml`.

    Args:
        text: YAML.
        where: what an error calls it.
    """
    if len(text) > MAX_BYTES:
        raise _beyond(where, "a larger file", f"at most {MAX_BYTES:,} bytes")
    try:
        _check_depth(text, where)
        root = yaml.compose(text, yaml.SafeLoader)
        if root is not None:
            _expanded(root, {}, where)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an integer of thousands of digits
        raise ConfigError("configuration is not YAML", where=where, got=str(error)[:500]) from error


def _check_depth(text: str, where: str) -> None:
    """Before anything is built, since building is recursive."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise _beyond(where, "deeper nesting", f"at most {MAX_DEPTH} levels")


def _expanded(node: yaml.Node, known: dict[int, int | None], where: str) -> int:
    """Nodes that a node stands for once every alias in it is written out."""
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise _beyond(where, "an alias inside what it stands for", "a tree")
        return count
    known[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [one for pair in node.value for one in pair]
    count = 1 + sum(_expanded(child, known, where) for child in children)
    if count > MAX_NODES:
        raise _beyond(where, "more values, aliases written out", f"at most {MAX_NODES:,} values")
    known[id(node)] = count
    return count


def _beyond(where: str, got: str, expected: str) -> ConfigError:
    return ConfigError("not a configuration of this project", where=where, got=got, expected=expected)
