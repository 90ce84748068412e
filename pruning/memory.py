"""How much memory a process may take: of the machine, within what a container or job allows, and of a device."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

#: Share of what is free that is taken without being asked.
_TAKEN = 0.9
#: Where Linux says how much memory a control group (a container, a job of a cluster) may take and has taken.
_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def free_memory(device: torch.device | None = None) -> int:
    """Return the bytes that this process may take in all: what it has already, and nine tenths of what is free.

    Parameters
    ----------
    device
        A GPU; the machine's own memory by default.
    """
    if device is not None and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return torch.cuda.memory_reserved(device) + int(_TAKEN * free)
    free = psutil.virtual_memory().available
    for limit, taken in _LIMITS:
        if limit.is_file() and limit.read_text().strip().isdigit():
            free = min(free, max(int(limit.read_text()) - int(taken.read_text()), 0))
    return psutil.Process().memory_info().rss + int(_TAKEN * free)
