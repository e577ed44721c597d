"""Imported by the server of a run's steps before it forks the first, for what that does.

Nothing else may import it: it tells the process not to end on SIGTERM. One that goes to the whole
group of a run's processes has to end its steps in order; the server goes with its run.
"""

import contextlib
import signal

import dagster as dg

from llmrec_assets.definitions import defs
from llmrec_assets.ground import surroundings

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Dagster sets a step's own handler
# Steps run the code that is loaded here, whatever is committed or installed meanwhile.
surroundings.hold()
defs.get_repository_def().load_all_definitions()
# Dagster imports its storages when an instance is opened, 400 modules. This one is closed again: no
# connection is inherited. Without a DAGSTER_HOME steps import them for themselves.
with contextlib.suppress(Exception), dg.DagsterInstance.get() as _instance:
    _instance.get_runs(limit=1)
