"""How much memory the processes of this machine may use."""

import os
from pathlib import Path

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files with the limit of a container, of the second and the first version of control groups."""


def host_memory() -> int:
    """Bytes of the machine's memory, or of the share that this container may use."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in _LIMITS:
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():  # or "max"
            memory = min(memory, int(text))
    return memory
