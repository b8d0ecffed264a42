"""Checks of `genrec doctor --store --runs`: folders that all nodes write and read, buckets that keep promises."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from genrec_dist.artifacts.bucket import Bucket
from genrec_dist.artifacts.places import CACHE_VARIABLE, is_url, local_folder, parse_url
from genrec_dist.errors import GenrecError
from launcher.doctor import MIN_DISK_GIB, Check
from launcher.doctor_probe import Probe

Ask = Callable[[str, dict[str, tuple]], dict[str, object]]
"""Calls a method of the probes of nodes, given arguments by node; answers by node, exceptions among them."""


def storage(places: dict[str, str], nodes: list[str], ask: Ask) -> Iterator[Check]:
    """Checks of all places.

    Args:
        places: folder or URL by option.
        nodes: names of the cluster's nodes, none without a cluster.
        ask: reaches them.
    """
    for option, place in places.items():
        try:
            folder = local_folder(place)
            if is_url(place):
                yield bucket_check(option, place)
            yield shared_folder(f"cache of {option}" if is_url(place) else option, folder, nodes, ask, is_url(place))
        except GenrecError as error:
            found = f"{error.what}: {error.got}" if error.got else error.what
            yield Check(option, "missing", found, str(error.expected or ""), error.fix or "")


def bucket_check(option: str, place: str) -> Check:
    """Write, read and remove an object, and see that the two conditions hold on which everything rests."""
    bucket, name = Bucket(parse_url(place)), f"doctor-{secrets.token_hex(8)}"
    try:
        tag = bucket.write(name, b"1", new=True)
        again = bucket.write(name, b"2", new=True)
        found = bucket.read(name)
        replaced = bucket.write(name, b"3", replacing=tag) if tag else None
        stale = bucket.write(name, b"4", replacing=tag) if tag else None
        listed = name in list(bucket.names("doctor-"))
        bucket.remove([name])
        left = bucket.read(name)
    finally:
        with contextlib.suppress(GenrecError):
            bucket.remove([name])
    needed = "writes, reads, lists, removes, and overwrites only as If-None-Match and If-Match allow"
    if again is not None or replaced is None or stale is not None:
        fix = "use a store with conditional writes: two writers could mix in this one"
        return Check(option, "missing", f"{place}: the server does not keep to conditions", needed, fix)
    if left is not None:
        return Check(option, "missing", f"{place}: an object cannot be removed", needed, "allow s3:DeleteObject")
    if found is None or found[0] != b"1" or not listed:
        return Check(option, "missing", f"{place}: an object does not come back as it was written", needed)
    return Check(option, "ok", place, needed)


def shared_folder(label: str, folder: Path, nodes: list[str], ask: Ask, is_cache: bool) -> Check:
    """What the driver writes, every node reads, and the reverse."""
    needed = "what one node writes, all nodes read" if nodes else "can be written"
    fix = (
        f"let {CACHE_VARIABLE} name a folder that all nodes share (NFS 4 or a cluster file system)"
        if is_cache
        else "use a folder on a file system that all nodes see at this path (NFS 4 or a cluster file system)"
    )
    trial, text, here = folder.resolve() / f".genrec-doctor-{secrets.token_hex(8)}", secrets.token_hex(16), Probe()
    try:
        trial.mkdir(parents=True)
        (trial / "driver").write_text(text)
    except OSError as error:
        found = f"{folder}: {type(error).__name__}: {error.strerror}"
        return Check(label, "missing", found, needed, "make it, and let this user write there")
    try:
        read = ask("read", {node: (str(trial / "driver"),) for node in nodes})
        wrong = [f"{node} reads {answer}" for node, answer in read.items() if answer != text]
        files = {node: str(trial / f"node-{place}") for place, node in enumerate(nodes) if read[node] == text}
        wrote = ask("write", {node: (file, node) for node, file in files.items()})
        wrong += [f"{node} writes: {answer}" for node, answer in wrote.items() if answer]
        wrong += [f"of {node} nothing is seen" for node, file in files.items() if here.read(file) != node]
        if wrong:
            return Check(label, "missing", f"{folder}: " + "; ".join(wrong), needed, fix)
        free = shutil.disk_usage(trial).free / 2**30
        found = f"{folder}, {free:.1f} GiB free" + (f", {len(nodes)} nodes" if nodes else "")
        if free < MIN_DISK_GIB:
            return Check(label, "warning", found, f">={MIN_DISK_GIB:g} GiB free", "free space")
        return Check(label, "ok", found, needed)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
