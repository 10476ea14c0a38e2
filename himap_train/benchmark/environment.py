"""What a time depends on beside the code: processor, GPU, threads, versions, and who else was using the machine."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from himap_train.versions import package_versions


def environment(device: str) -> dict[str, Any]:
    """Facts as JSON types; `load` is the machine's own one-minute average, None where it has none."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "system": platform.platform(),
        "versions": package_versions(),
        "load": load_average(),
    }


def command_line() -> str:
    """What a user would type to run this process again."""
    return shlex.join(["python", *sys.argv])


def load_average() -> float | None:
    """Runnable processes, averaged over the last minute; the benchmark itself is about one of them."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
