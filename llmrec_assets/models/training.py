"""What every LoRA training by a trainer of the libraries shares.

What belongs here: adapters in and out, trainer checkpoints that are whole or unmarked, progress,
library versions. What does not: a loss or a data set (``sft``, ``dpo``, ``reward``, ``ppo``).
"""

from __future__ import annotations

import importlib.metadata
import shutil
import time
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import TrainerCallback

from llmrec_assets.ground.errors import ModelError
from llmrec_assets.ground.recipes import LoraRecipe
from llmrec_assets.models.device import Device
from llmrec_assets.models.progress import Progress, ProgressEvent

#: Written into a trainer checkpoint once it is whole: a kill while saving leaves one without it.
COMPLETE = "COMPLETE"


def lora_config(recipe: LoraRecipe, task_type: str) -> LoraConfig:
    """The recipe's adapter for ``CAUSAL_LM`` or ``SEQ_CLS``."""
    return LoraConfig(
        r=recipe.r,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=recipe.target_modules,
        task_type=task_type,
    )


def optimizer_name(device: Device) -> str:
    """The trainers' name of AdamW; on a GPU in one kernel."""
    return "adamw_torch_fused" if device.type == "cuda" else "adamw_torch"


def save_adapter(model: Any, directory: Path, base_name: str, adapter: str = "default") -> Path:
    """Writes one adapter of a peft model, safetensors and JSON only; returns ``directory``.

    Raises:
        ModelError: a trained weight is no number: the training diverged.
    """
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name and not bool(parameter.isfinite().all()):
            raise ModelError(
                f"the training diverged ({name} holds NaN or infinity), so nothing is published: "
                "lower its learning_rate in the recipe, or use dtype float32"
            )
    shutil.rmtree(directory, ignore_errors=True)
    # The base model goes by its version: a machine's path has no business in a checkpoint.
    model.peft_config[adapter].base_model_name_or_path = base_name
    # Embeddings are untouched; left to itself, peft would ask the hub about them.
    model.save_pretrained(directory, selected_adapters=[adapter], save_embedding_layers=False)
    if adapter != "default":  # peft gives a named adapter a directory of its own
        nested = directory / adapter
        for path in nested.iterdir():
            path.rename(directory / path.name)
        nested.rmdir()
    (directory / "README.md").unlink(missing_ok=True)
    return directory


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what a training makes."""
    names = ("torch", "transformers", "peft", "trl", "accelerate")
    return {name: importlib.metadata.version(name) for name in names}


class ReportProgress(TrainerCallback):
    """Turns trainer logs into progress events and marks complete checkpoints."""

    def __init__(self, what: str, progress: Progress, batch_size: int) -> None:
        self._what = what
        self._progress = progress
        self._batch_size = batch_size
        self._started = time.monotonic()
        self._first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.monotonic()
        self._first_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        seconds = max(time.monotonic() - self._started, 1e-9)
        per_second = (state.global_step - self._first_step) / seconds
        self._progress(
            ProgressEvent(
                what=self._what,
                step=state.global_step,
                total=state.max_steps,
                examples_per_second=per_second * self._batch_size,
                seconds_left=(state.max_steps - state.global_step) / max(per_second, 1e-9),
                loss=float(logs["loss"]),
            )
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def last_complete_checkpoint(work_dir: Path) -> Path | None:
    """The newest whole trainer checkpoint; ones that a kill left incomplete are removed."""
    whole = []
    for path in work_dir.glob("checkpoint-*"):
        if (path / COMPLETE).exists():
            whole.append(path)
        else:
            shutil.rmtree(path)
    return max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def steps_kept(work_dir: Path) -> int:
    """The step at which a trainer would resume what ``work_dir`` holds; 0: afresh."""
    newest = last_complete_checkpoint(work_dir)
    return int(newest.name.rsplit("-", 1)[1]) if newest else 0
