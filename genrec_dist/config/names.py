"""Names that become folders."""

from __future__ import annotations

import re

from genrec_dist.errors import ConfigError

NAME_PATTERN = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")


def check_name(name: str, where: str = "name") -> str:
    """Return `name` if it is safe as one path component.

    Raises:
        ConfigError: anything but letters, digits, '.', '_' and '-', or a leading dot.
    """
    if not NAME_PATTERN.match(name):
        raise ConfigError(
            "not a valid name",
            where=where,
            got=repr(name),
            expected="letters, digits, '.', '_', '-', starting with a letter or digit, at most 100",
            fix="choose a plain name; it becomes a folder",
        )
    return name
