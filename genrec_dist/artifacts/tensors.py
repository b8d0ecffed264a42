"""One safetensors file, whole on the disk, with its SHA-256. Knows nothing of checkpoints or stages."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from genrec_dist.artifacts.files import sync_folder

OS_ERROR = re.compile(r"\(os error (\d+)\)")
PIECE = 4 << 20


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> dict:
    """Write a safetensors file and flush it, with its name, to the disk.

    The digest is of the header as written and the tensors as they are in memory: nothing is read back, and what the
    disk made of them is held against it when the file is read. Writing, flushing and hashing release the interpreter.

    Args:
        tensors: on the CPU, not changed meanwhile.
        path: file, replaced if it is there.

    Returns:
        bytes and sha256 of the file.

    Raises:
        OSError: the file system's own error (no space, no quota, no such folder); nothing is left at `path`.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    try:
        _save(tensors, path)
        path.chmod(mode)  # safetensors makes a file of its own that others may not read
        with open(path, "rb+") as handle:
            header = handle.read(8)
            header += handle.read(int.from_bytes(header, "little"))
            os.fsync(handle.fileno())
        sync_folder(path.parent)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return {"bytes": path.stat().st_size, "sha256": _digest(header, tensors)}


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # the operating system's error is in its text alone
        found = OS_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def _digest(header: bytes, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(header)
    places = {name: entry["data_offsets"][0] for name, entry in json.loads(header[8:]).items() if name in tensors}
    for name in sorted(places, key=lambda name: (places[name], tensors[name].nbytes)):  # an empty one has no room
        values = tensors[name].reshape(-1).view(torch.uint8).numpy().data
        for first in range(0, len(values), PIECE):
            digest.update(values[first : first + PIECE])
    return digest.hexdigest()
