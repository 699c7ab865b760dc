"""The machine and the libraries that figures were measured with, and the packages that are missing on it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

PEERS = ("torch", "transformers", "peft")


def facts(threads: int) -> dict[str, Any]:
    """Processor, memory, GPU and versions; None for whatever the machine lacks."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]  # type: ignore[index,call-overload,unused-ignore]
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": threads,
        "memory_bytes": _memory_bytes(),
        "gpu": _gpu(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas['name']} {blas['version']}",
        **{name: _version(name) for name in ("cupy-cuda12x", "cupy-cuda13x", *PEERS)},
    }


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def missing_peers() -> list[str]:
    """The packages that the peer's side needs and that are not installed. Nothing is imported to find out."""
    return [name for name in PEERS if find_spec(name) is None]


def gpu_trouble() -> str:
    """The reason why no GPU can be used, else "". Another process asks, so that this one holds no GPU memory."""
    command = [sys.executable, "-c", "from minilora.backend import use; use('cuda')"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1].removeprefix("RuntimeError: ") if done.returncode else ""


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _memory_bytes() -> int | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpu() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
