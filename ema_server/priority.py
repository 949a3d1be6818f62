"""The server's scheduling priority: it gives way to the training where both share few CPUs.

A server that takes turns with the training on the same cores adds to each step what it computes. With a lower priority
it uses what the training leaves, and falls behind where that is too little: then snapshots are skipped and counted.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

AUTO = "auto"
NICE_OF_FEW_CPUS = 10  # a ninth of the share of a process that is not nice
CPUS_TO_SPARE = 4  # with as many the server finds a core of its own

_TASKS = Path("/proc/self/task")  # Linux keeps a niceness for each thread
_CGROUP = Path("/sys/fs/cgroup")  # version 2, as a container sees its own quota

logger = logging.getLogger("ema")


def lower_priority(setting: str, cgroup: Path = _CGROUP) -> int:
    """Give all threads of this process the niceness that `setting` asks for: `auto`, or 0 to 19. It is never reduced.

    Threads that are started later have that of the thread that starts them.

    Returns:
        The niceness from now on; what it was if the system does not permit another.
    """
    before = os.getpriority(os.PRIO_PROCESS, 0)
    cpus = usable_cpus(cgroup)
    wanted = (NICE_OF_FEW_CPUS if cpus < CPUS_TO_SPARE else 0) if setting == AUTO else int(setting)
    if wanted <= before:
        return before
    try:
        for thread in _threads():
            with suppress(ProcessLookupError):  # it has ended
                os.setpriority(os.PRIO_PROCESS, thread, wanted)
    except OSError as error:
        logger.warning("the scheduling priority stays at nice %d: %s", before, error.strerror)
        return before
    if setting == AUTO:
        logger.info("scheduling priority: nice %d, since there are only %g CPUs (--nice 0 changes that)", wanted, cpus)
    return wanted


def _threads() -> list[int]:
    """The ids of this process's threads; 0, which is all of them, where the system does not list them."""
    try:
        return [int(entry.name) for entry in _TASKS.iterdir()]
    except OSError:
        return [0]


def usable_cpus(cgroup: Path = _CGROUP) -> float:
    """How many CPUs this process may use: its affinity, or the quota of its container if that is less."""
    cpus = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(os.cpu_count() or 1)
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return min(cpus, int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return cpus
