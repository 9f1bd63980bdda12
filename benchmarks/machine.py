"""What numbers are made with, and where they go: shared by the benchmarks of this folder."""

import importlib.metadata
import json
import os
import pathlib
import platform
import sys
from typing import Any

HUGE_PAGES = "glibc.malloc.hugetlb=1"


def with_huge_pages() -> None:
    """Starts this program again with huge pages for every allocation, unless it has them: a Linux matter of glibc.

    Without them a long array's first touch, page by page, costs as much as computing it does.
    """
    if HUGE_PAGES not in os.environ.get("GLIBC_TUNABLES", ""):
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [os.environ.get("GLIBC_TUNABLES"), HUGE_PAGES]))
        os.execv(sys.executable, [sys.executable, *sys.argv])


def describe(*packages: str) -> dict[str, Any]:
    """Device, versions, command line and present load, to begin a results file with."""
    model, info = platform.processor(), pathlib.Path("/proc/cpuinfo")
    if info.exists():
        lines = [line.split(":", 1) for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0][1].strip() if lines else model
    return {
        "device": f"CPU, {os.cpu_count()} cores, {model}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "command": " ".join(["python", *sys.argv]),
        "load_average": os.getloadavg(),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }


def write(results: dict[str, Any], path: pathlib.Path) -> None:
    """The results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
