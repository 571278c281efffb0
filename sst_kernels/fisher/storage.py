"""Files that are whole or not there: safetensors with a JSON header and a checksum, written beside the old one and renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SCHEMA = 1


class StorageError(OSError):
    """A file could not be written; what stood under its name before is intact.

    Example:
        >>> from sst_kernels.fisher import StorageError
        >>> try:
        ...     gain.save("no/such/folder/gain.safetensors")
        ... except StorageError as error:
        ...     print(error.__class__.__name__)
        StorageError
    """


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-able header to one safetensors file: temporary sibling, fsync, rename, fsync of the folder.

    Raises StorageError (disk full, folder missing or not writable), after removing the temporary file.
    """
    path = Path(path)
    held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps({"schema": SCHEMA, **header})
    metadata = {"sst_kernels": f"{_checksum(text, held)} {text}"}  # one entry: safetensors shuffles several
    temporary = path.with_name(f"{partial_prefix(path)}{secrets.token_hex(6)}")
    try:
        save_file(held, temporary, metadata)
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        before = "the previous one is intact" if os.path.exists(path) else "nothing was left there"
        raise StorageError(
            f"{path} could not be written ({error}); {before}: free space or choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_tensors(
    path: str | os.PathLike, device: torch.device | str = "cpu"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file that `write_tensors` wrote.

    Raises ValueError when it is no such file, is damaged or truncated, or has another schema.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}): write it again") from error
    checksum, _, text = metadata.get("sst_kernels", "- null").partition(" ")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its header is damaged ({error}): write it again") from error
    found = header.get("schema") if isinstance(header, dict) else None
    if found != SCHEMA:
        raise ValueError(
            f"{path} is no file of sst_kernels with schema {SCHEMA} (found {found}): write it with this version"
        )
    if checksum != _checksum(text, tensors):
        raise ValueError(f"{path} is damaged (its checksum does not match its contents): write it again")
    return header, {name: t.to(device) for name, t in tensors.items()}


def partial_prefix(path: Path) -> str:
    """What the names of unfinished versions of `path` begin with."""
    return f".{path.name}.partial-"


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
