"""Libraries that a listed graph does not need: loaded when something first reads from them.

What belongs here: their names, and the module that stands in until then. What does not: torch and
transformers, which only the models' floor imports.

A code server describes assets and runs none, yet with pandas and DuckDB imported it holds 100 MB
more for as long as it lives, and every step process begins by loading the definitions. ``import
pandas as pd`` stays as it is everywhere; a name taken out of a library (``from pandas import …``)
loads it.

``importlib.util.LazyLoader`` is meant for this, but before Python 3.12 a second ``import`` loads
the library, and a second thread sees it half loaded.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from types import ModuleType
from typing import Any

#: What ``import`` itself asks a module for, each time.
_ASKED_BY_IMPORT = frozenset({"__spec__", "__class__"})
_lock = threading.RLock()
_loading: set[str] = set()


class _Deferred(ModuleType):
    """A module that executes itself when an attribute is first read, written or deleted."""

    def __getattribute__(self, name: str) -> Any:
        if name not in _ASKED_BY_IMPORT:
            _load(self)
        return ModuleType.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _load(self)
        ModuleType.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        _load(self)
        ModuleType.__delattr__(self, name)


def _load(module: _Deferred) -> None:
    spec = ModuleType.__getattribute__(module, "__spec__")
    with _lock:  # another thread waits here until the library is whole
        if type(module) is not _Deferred or spec.name in _loading:
            return  # loaded meanwhile, or the library's own code reads from it
        _loading.add(spec.name)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            sys.modules.pop(spec.name, None)  # as after an import that failed
            raise
        finally:
            _loading.discard(spec.name)
        ModuleType.__setattr__(module, "__class__", ModuleType)


def defer(*names: str) -> None:
    """Lets ``import name`` cost nothing until the library is used; what is loaded stays so.

    Args:
        names: top-level libraries. One that is not installed is left to its ``import`` to report.
            None whose submodules a second thread may import by itself at the first use: that thread
            would hold the submodule's lock and wait for the library's, which waits for it.
    """
    for name in names:
        if name in sys.modules:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            continue
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        ModuleType.__setattr__(module, "__class__", _Deferred)


defer("pandas", "duckdb", "rapidfuzz", "requests")
