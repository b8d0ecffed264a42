"""Objects of an S3-compatible store below one prefix: read, write on a condition, list, remove. Knows no artifacts.

Credentials, region and endpoint come from where boto3 looks for them, the environment first; they are never passed on.
Needs the extra 's3'.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from genrec_dist.artifacts.places import Url
from genrec_dist.errors import ClusterError, ConfigError

ABSENT = ("404", "NoSuchKey", "NotFound")
REFUSED = ("412", "PreconditionFailed")
CONFLICT = ("409", "ConditionalRequestConflict")
CONFLICT_TRIES, CONFLICT_SECONDS = 5, 0.2
"""How often a conditional write is tried that met another one, and the pause before each further try."""
REMOVED_AT_ONCE = 1000


class Bucket:
    """A prefix of a bucket; names are below it.

    Args:
        url: the place.
    """

    def __init__(self, url: Url) -> None:
        self.url = url
        self._client = _client()
        self._prefix = "/".join(url.prefix) + "/"

    def read(self, name: str) -> tuple[bytes, str] | None:
        """Bytes and tag of an object, None if there is none."""
        with self._errors(name, *ABSENT):
            answer = self._client.get_object(Bucket=self.url.bucket, Key=self._prefix + name)
            return answer["Body"].read(), answer["ETag"]
        return None

    def write(self, name: str, data: bytes, *, new: bool = False, replacing: str | None = None) -> str | None:
        """Write an object, whole or not at all.

        Args:
            name: of the object.
            data: its content.
            new: only if there is none of that name.
            replacing: only if the one that is there has this tag.

        Returns:
            Its tag, also where an earlier try of this call got through and its answer was lost; None if the condition
            did not hold. Writers whose bytes may be alike cannot be told apart.
        """
        condition = {"IfNoneMatch": "*"} if new else {"IfMatch": replacing} if replacing else {}
        expected = (*REFUSED, *CONFLICT, *(ABSENT if replacing else ())) if condition else ()
        for tried in range(1, CONFLICT_TRIES + 1):
            with self._errors(name, *expected) as refusal:
                answer = self._client.put_object(
                    Bucket=self.url.bucket, Key=self._prefix + name, Body=data, **condition
                )
                return answer["ETag"]
            if refusal[0] not in CONFLICT:
                there = self.read(name)
                return there[1] if there is not None and there[0] == data else None
            if tried < CONFLICT_TRIES:
                time.sleep(CONFLICT_SECONDS * tried)
        raise self._failure(name, refusal[0])

    def upload(self, file: Path, name: str) -> None:
        """Write a file's bytes, of any size."""
        with self._errors(name):
            self._client.upload_file(str(file), self.url.bucket, self._prefix + name)

    def download(self, name: str, file: Path) -> bool:
        """Read an object into a file; False if there is none."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._errors(name, *ABSENT):
            self._client.download_file(self.url.bucket, self._prefix + name, str(file))
            return True
        return False

    def names(self, prefix: str = "") -> Iterator[str]:
        """Names of all objects that begin with `prefix`."""
        with self._errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.url.bucket, Prefix=self._prefix + prefix
            )
            for page in pages:
                for found in page.get("Contents", ()):
                    yield found["Key"].removeprefix(self._prefix)

    def folders(self) -> list[str]:
        """First parts of the names of all objects that have more than one."""
        with self._errors(""):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.url.bucket, Prefix=self._prefix, Delimiter="/"
            )
            found = [one["Prefix"] for page in pages for one in page.get("CommonPrefixes", ())]
        return [name.removeprefix(self._prefix).rstrip("/") for name in found]

    def copy(self, source: str, target: str) -> None:
        """Copy an object inside the store, if it is there."""
        with self._errors(source, *ABSENT):
            there = {"Bucket": self.url.bucket, "Key": self._prefix + source}
            self._client.copy(there, self.url.bucket, self._prefix + target)

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; those that are not there do not matter."""
        keys = [{"Key": self._prefix + name} for name in names]
        with self._errors(""):
            for start in range(0, len(keys), REMOVED_AT_ONCE):
                batch = {"Objects": keys[start : start + REMOVED_AT_ONCE], "Quiet": True}
                answer = self._client.delete_objects(Bucket=self.url.bucket, Delete=batch)
                for failed in answer.get("Errors", ()):
                    if failed.get("Code") in ABSENT:
                        continue
                    name = failed.get("Key", "").removeprefix(self._prefix)
                    raise self._failure(name, f"not removed: {failed.get('Code')}")

    @contextmanager
    def _errors(self, name: str, *expected: str) -> Iterator[list[str]]:
        """Give errors a type; of a code that is expected, note it and go on behind the block."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        noted: list[str] = []
        try:
            yield noted
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code not in expected:
                raise self._failure(name, code or "error") from error
            noted.append(code)
        except (BotoCoreError, Boto3Error) as error:
            raise self._failure(name, f"{type(error).__name__}: {error}") from error

    def _failure(self, name: str, got: str) -> ClusterError:
        return ClusterError(
            "the object store does not do what is asked",
            where=f"{self.url}/{name}",
            got=got,
            expected="a bucket that may be listed and read, and whose objects may be written and removed",
            fix="check network, AWS_ENDPOINT_URL_S3 and credentials, `genrec doctor --store URL`; the same command "
            "continues",
        )


def _client() -> Any:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return _shared_client(endpoint, region, os.environ.get("AWS_ACCESS_KEY_ID"))


@lru_cache(maxsize=4)
def _shared_client(endpoint: str | None, region: str | None, account: str | None) -> Any:
    """One client for all places, since making one takes a while; threads may share it.

    Args:
        endpoint: of a server other than Amazon's, which boto3 finds in the environment itself.
        region: likewise.
        account: whose credentials they are; boto3 finds these, too.
    """
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise ConfigError(
            "a package for s3:// is not installed",
            where="--store or --runs",
            expected="boto3",
            fix="pip install 'genrec_dist[s3]'",
        ) from None
    settings: dict[str, Any] = {"s3": {"addressing_style": "path"}} if endpoint else {}
    return boto3.client(
        "s3",
        region_name=region or ("us-east-1" if endpoint else None),
        config=Config(
            retries={"mode": "standard", "max_attempts": 5},
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=32,
            **settings,
        ),
    )
