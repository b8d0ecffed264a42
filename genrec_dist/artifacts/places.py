"""Where artifacts and runs are kept: a folder, or `s3://BUCKET/PREFIX` with a folder of the cache in front of it.

The folder of a URL is `$GENREC_CACHE/s3/BUCKET/PREFIX` (default `~/.cache/genrec_dist`), so the paths between a run and
its artifacts are the same in every cache. Talks to no server.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from genrec_dist.config import check_name
from genrec_dist.errors import ConfigError

SCHEME = "s3://"
CACHE_VARIABLE = "GENREC_CACHE"
BUCKET_PATTERN = re.compile(r"^[a-z0-9](?:[a-z0-9-]|\.(?!\.)){1,61}[a-z0-9]$")


@dataclass(frozen=True)
class Url:
    """A place in an S3 bucket.

    Args:
        bucket: its name.
        prefix: names between the slashes, at least one.
    """

    bucket: str
    prefix: tuple[str, ...]

    def __str__(self) -> str:
        return SCHEME + "/".join((self.bucket, *self.prefix))


def is_url(place: str | Path) -> bool:
    """Whether a place is a URL (of any kind) and not a folder."""
    return isinstance(place, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", place) is not None


def folder_only(place: str | Path, where: str) -> Path:
    """A place that has to be a folder.

    Raises:
        ConfigError: it is a URL.
    """
    if is_url(place):
        parse_url(str(place), where)
        raise ConfigError(
            "this command keeps its files in a folder",
            where=where,
            got=place,
            expected="a folder",
            fix="name one, on shared storage where several hosts take part; `genrec run` takes a URL",
        )
    return Path(place)


def parse_url(text: str, where: str = "--store or --runs") -> Url:
    """The place that a URL names.

    Raises:
        ConfigError: another scheme, no valid bucket, or a prefix that could not become a folder. The text itself is not
            repeated where it may hold a password.
    """
    bucket, _, rest = text.removeprefix(SCHEME).partition("/")
    parts = rest.rstrip("/").split("/")
    if not text.startswith(SCHEME) or not BUCKET_PATTERN.match(bucket) or not all(parts):
        raise ConfigError(
            "not a place for artifacts or runs",
            where=where,
            got=text if "@" not in text else "a URL with a user or password",
            expected="a folder, or s3://BUCKET/PREFIX",
            fix="credentials and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL_S3 ...)",
        )
    return Url(bucket, tuple(check_name(part, where) for part in parts))


def is_inside(name: object) -> bool:
    """Whether a name that a server gave stays inside the folder that it is put under."""
    parts = Path(name).parts if isinstance(name, str) else ()
    return bool(parts) and ".." not in parts and not Path(str(name)).is_absolute() and "\0" not in str(name)


def cache_root() -> Path:
    """Folder in front of all URLs. Where a run has workers on several nodes, all of them must see it."""
    named = os.environ.get(CACHE_VARIABLE)
    return (Path(named) if named else Path.home() / ".cache" / "genrec_dist").resolve()


def local_folder(place: str | Path) -> Path:
    """The folder that is worked in: the place itself, or the cache's folder of a URL."""
    if not is_url(place):
        return Path(place)
    url = parse_url(str(place))
    return cache_root().joinpath("s3", url.bucket, *url.prefix)


def place_of(folder: Path) -> str | Path:
    """The place that a folder belongs to: a URL for one inside the cache, else the folder itself."""
    try:
        inner = folder.resolve().relative_to(cache_root() / "s3")
    except ValueError:
        return folder
    return SCHEME + inner.as_posix() if len(inner.parts) > 1 else folder
