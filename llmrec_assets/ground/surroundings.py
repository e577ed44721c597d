"""What this process runs on: commit, library versions, machine.

What belongs here: facts that decide which bits come out, asked of the running process, and holding
it to them. What does not: writing them down (``provenance``). Neither host names nor paths are
told.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import pkgutil
import platform
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from llmrec_assets import ground

_used = False
_PROJECT = Path(__file__).resolve().parents[2]


@cache
def commit() -> str | None:
    """The commit of the project's checkout, ``-dirty`` behind it where a tracked file differs;
    ``None`` outside a checkout. Asked once a process: the code that runs is the code loaded."""
    # An installed copy may lie inside somebody else's repository: that one's commit says nothing.
    if not (_PROJECT / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "-C", str(_PROJECT), "describe"]
    command += ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() or None


def hold() -> None:
    """Imports every module of this floor, most of which the definitions do without, and asks for
    commit and versions: what a long run reaches late is then the code that they tell, too."""
    import_all(ground)
    commit()
    library_versions()


def import_all(package: ModuleType) -> None:
    """Imports every module of a package that can be imported."""
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        # The step that needs what cannot be imported says so; others need not fail with it.
        with contextlib.suppress(Exception):
            importlib.import_module(module.name)


@cache
def library_versions() -> dict[str, str]:
    """Versions of Python and of the packages the project requires, by name."""
    versions = {"python": platform.python_version()}
    for requirement in _requirements():
        name = re.match(r"[\w.-]+", requirement)
        if name is not None and "extra ==" not in requirement:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name[0]] = importlib.metadata.version(name[0])
    return versions


def _requirements() -> list[str]:
    # A checkout's own file first: the metadata of an editable install is as old as the install.
    project = _PROJECT / "pyproject.toml"
    if project.is_file():
        told = tomllib.loads(project.read_text(encoding="utf-8"))
        return list(told["project"]["dependencies"])
    return importlib.metadata.requires("llmrec_assets") or []


def machine() -> dict[str, Any]:
    """CPU model, cores, torch's threads and the GPU.

    Torch is asked only where the process has said that it uses a model (``use_models``): it may be
    loaded in any. ``gpu`` is ``None`` also where none was used.
    """
    torch = sys.modules.get("torch") if _used else None
    gpu = None
    if torch is not None and torch.cuda.is_initialized():
        gpu = torch.cuda.get_device_name()
    return {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": None if torch is None else torch.get_num_threads(),
        "gpu": gpu,
    }


def use_models() -> None:
    """This process uses a model: torch's threads may show in what it makes."""
    global _used
    _used = True


@cache
def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
