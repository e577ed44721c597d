"""LensKit's threads, kept to one and to itself.

What belongs here: the context in which every LensKit fit and score runs. What does not: fits
(``classical``, ``leave_last_out``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from lenskit.parallel import initialize


@contextmanager
def one_lenskit_thread() -> Iterator[None]:
    """One thread for LensKit and for torch below it, and torch's number put back.

    The same bits then come out whatever ran before in the process. LensKit sets torch's number for
    the whole process at its first use; a training afterwards would get other sums than one alone.
    """
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "failed to set .*threads", RuntimeWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        _initialize()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@cache
def _initialize() -> None:
    initialize(threads=1, backend_threads=1)
