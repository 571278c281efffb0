"""How much more memory this process may take: of a GPU, of the host, and of the container or job that it runs in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

_ROOT = Path("/")  # of /proc and /sys; tests bring their own


def available(device: torch.device | str) -> int | None:
    """Bytes that this process may still take on a device; None where that cannot be known.

    Of a GPU what its driver has free, and what torch's allocator holds without using it. Of the host what Linux says is available,
    and no more than what any memory limit on this process (cgroup 1 or 2) leaves.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    host = _number(_ROOT / "proc/meminfo", "MemAvailable:")
    return min([*([] if host is None else [host * 1024]), *_cgroups()], default=None)


def _cgroups() -> Iterator[int]:
    """What the memory limits on this process's group, and on the groups above it that can be seen from here, leave.

    A group's memory includes files that were read or written. The inactive ones give way when a process asks for more, so they
    do not count as taken.
    """
    for controllers, own in re.findall(r"^\d+:([^:\n]*):(.*)$", _text(_ROOT / "proc/self/cgroup"), re.MULTILINE):
        if not controllers:
            mount, limit, taken, inactive = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, taken = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            inactive = "total_inactive_file"
        else:
            continue
        group = PurePosixPath(own.lstrip("/"))  # the host's name; in a container perhaps only the root is there
        for folder in (_ROOT / mount / part for part in (group, *group.parents)):
            most, used = _number(folder / limit), _number(folder / taken)
            if most is not None and used is not None:
                yield max(0, most - used + (_number(folder / "memory.stat", inactive) or 0))


def _number(path: Path, field: str = "") -> int | None:
    """The number that a file begins with, or that follows a field's name; None for another text ("max")."""
    found = re.search(rf"^{field}\s*(\d+)", _text(path), re.MULTILINE)
    return int(found[1]) if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # not there, or not ours to read
        return ""
