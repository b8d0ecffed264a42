"""Leaving secrets out of what is written down: command lines, and texts that may repeat a value of the environment.

It knows names that speak (`--token`, `AWS_SECRET_ACCESS_KEY`), users in URLs, and the shapes of common keys. A secret
with neither is not found: put none on a command line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

HIDDEN = "***"
SPEAKING = re.compile(
    r"(?:^|[._-])(?:token|secret|password|passwd|credentials?|api[_-]?key|access[_-]?key(?:[_-]?id)?|auth)$",
    re.IGNORECASE,
)
SHAPES = re.compile(
    r"\b(?:(?:AKIA|ASIA)[A-Z0-9]{16}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*)"
)
USER_IN_URL = re.compile(r"(?<=://)(?:[^\s/@]*:\S+|[^/@\s]+)(?=@)")
"""With a password up to the last @ of the word, since it may hold / and @."""
SHORTEST = 8
"""Values of the environment shorter than this could be anything."""


def redact_text(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text without keys by their shape, users in URLs, and values of variables that are secret by their names."""
    environment = os.environ if environment is None else environment
    secrets = [value for name, value in environment.items() if SPEAKING.search(name) and len(value) >= SHORTEST]
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return SHAPES.sub(HIDDEN, USER_IN_URL.sub(HIDDEN, text))


def redact_command(command: list[str], environment: Mapping[str, str] | None = None) -> list[str]:
    """A command line without what looks secret: `--token X`, `--token=X`, `a.password=X`, and as `redact_text`."""
    shown, hide = [], False
    for word in command:
        name, equals, _ = word.partition("=")
        if hide:
            shown.append(HIDDEN)
        elif equals and SPEAKING.search(name):
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(redact_text(word, environment))
        hide = not hide and not equals and word.startswith("-") and SPEAKING.search(word) is not None
    return shown
