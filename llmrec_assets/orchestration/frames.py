"""``Frame``: a table in the signature of an asset.

To the type checker it is pandas' ``DataFrame``. Dagster, which reads every signature when it lists
the graph, sees ``Any`` and so imports no pandas for that (see ``deferred``); the IO manager checks
a table against its schema in any case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame as Frame
else:
    Frame = Any

__all__ = ["Frame"]
