"""Model floor: torch, transformers, peft and trl. Paths in, paths and numbers out; no Dagster."""

import os
import warnings

# Progress is reported through ``models.progress``; bars would fill a run's log with half lines.
# Set before transformers is imported, which is when it reads them.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# TRL's trainers would report their use to the Hub, which nobody here asked for.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# TRL 1.16 still passes transformers 5.23 the old name of an option.
warnings.filterwarnings(
    "ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning
)
