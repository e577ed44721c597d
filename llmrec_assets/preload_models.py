"""Imported by the server of a run's steps, behind ``preload``, before a run that uses models."""

import contextlib
import importlib

_MODULES = ("answers", "classical_lists", "dpo", "leave_last_out", "ppo", "reward", "sft")

for _name in _MODULES:
    # The step that needs what cannot be imported says so; others need not fail with it.
    with contextlib.suppress(Exception):
        importlib.import_module(f"llmrec_assets.models.{_name}")
