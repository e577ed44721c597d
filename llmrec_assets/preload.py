"""Imported by the server of a run's steps before it forks the first, for what that does.

Nothing else may import it: it tells the process not to end on SIGTERM. One that goes to the whole
group of a run's processes has to end its steps in order; the server goes with its run.
"""

import signal

import llmrec_assets.definitions  # noqa: F401
from llmrec_assets.ground import surroundings

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Dagster sets a step's own handler
# Steps run the code that is loaded here, whatever is committed or installed meanwhile.
surroundings.commit()
surroundings.library_versions()
