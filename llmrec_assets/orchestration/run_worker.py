"""A step and the process that runs its run.

What belongs here: ending a step whose run worker is gone. What does not: runs whose process is gone
(``dead_runs``), the device (``resources``).
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time

_EXIT_STATUS = 70

_LOOK_EVERY = 1.0  # seconds

_watch: threading.Thread | None = None


def end_with_run_worker() -> None:
    """A step whose run worker dies ends itself at once, so that it does not train on unseen; so
    does one whose server (``executor``) dies, since Dagster takes that step for dead.

    What it was making stays where it was: trainer checkpoints are whole or unmarked, and a table or
    a version is published by rename. Only a step process that multiprocessing started has a run
    worker; in-process runs have none, and nothing happens.
    """
    global _watch
    worker = multiprocessing.parent_process()
    if worker is None or _watch is not None:
        return

    def watch() -> None:
        worker.join()  # ends when the worker's end of a pipe closes, however it died
        os._exit(_EXIT_STATUS)

    _watch = threading.Thread(target=watch, name="end-with-run-worker", daemon=True)
    _watch.start()
    server = os.getppid()
    if server == worker.pid:
        return

    def watch_server() -> None:
        while os.getppid() == server:
            time.sleep(_LOOK_EVERY)
        os._exit(_EXIT_STATUS)

    threading.Thread(target=watch_server, name="end-with-server", daemon=True).start()
