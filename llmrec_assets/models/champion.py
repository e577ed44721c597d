"""A policy as a champion: packed to stand alone, loaded again, asked about validation users.

What belongs here: the weights of the champion's directory and the lists that they give. What does
not: the rest of the directory (``ground.champion``), the decision (``ground.promotion``).

The challenger is packed first and answers from its package, so that what is judged is what serves.
"""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrec_assets.ground.answers import answer_versions, ground_responses
from llmrec_assets.ground.challengers import Challenger, Source
from llmrec_assets.ground.champion import ADAPTER, MODEL, read_served, write_served
from llmrec_assets.ground.serving import serving_prompts
from llmrec_assets.ground.store import MANIFEST, checkpoint_version
from llmrec_assets.models.answers import answer_prompts
from llmrec_assets.models.device import Device
from llmrec_assets.models.loading import load_policy
from llmrec_assets.models.progress import Progress, silent


def pack_champion(challenger: Challenger, directory: Path) -> Path:
    """Writes the challenger's policy into ``directory``, which is made anew; returns it.

    SFT's adapter is merged into the base model as ``load_policy`` merges it; one on top of it stays
    an adapter, as it was trained. Nothing points outside the directory.
    """
    served = challenger.served
    merged, *live = challenger.adapters
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    model, tokenizer = load_policy(
        challenger.base_model,
        [merged],
        dtype=getattr(torch, served.generation.dtype),
        device=torch.device("cpu"),
    )
    model.config._name_or_path = served.base_model
    model.save_pretrained(directory / MODEL)
    tokenizer.save_pretrained(directory / MODEL)
    for adapter in live:
        shutil.copytree(adapter, directory / ADAPTER, ignore=shutil.ignore_patterns(MANIFEST))
        path = directory / ADAPTER / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = MODEL
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_served(directory, served, challenger.catalogue)
    return directory


def load_champion(directory: Path, *, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """Model in eval mode and tokenizer of a champion's directory."""
    tokenizer = AutoTokenizer.from_pretrained(directory / MODEL)
    model = AutoModelForCausalLM.from_pretrained(directory / MODEL, dtype=dtype)
    if (directory / ADAPTER).is_dir():
        model = PeftModel.from_pretrained(model, directory / ADAPTER)
        if dtype == torch.float32:  # as ``load_policy``
            model = model.merge_and_unload()
    return model.to(device).eval(), tokenizer


def validation_lists(
    directory: Path,
    asked: pd.DataFrame,
    source: Source,
    *,
    side: str,
    version: str,
    prompts_version: str,
    top_k: int,
    seed: int,
    code: str,
    work_dir: Path,
    device: Device,
    progress: Progress = silent,
) -> pd.DataFrame:
    """The lists that a champion's directory gives for validation windows, in its own words, from
    its own catalogue, by its own decoding.

    Killed and called again with the same ``work_dir``, finished answers are read, not made again.

    Args:
        asked: ``PROMPTS`` of the windows, for whose and until when; their text is not read.
        side: the lists' stage, and ``version`` of what gives them.
        top_k: films of a list: the challenger's, for both sides.

    Returns:
        ``RECOMMENDATIONS``.
    """
    served, catalogue = read_served(directory)
    ratings = source.ratings.frame
    prompts = serving_prompts(asked, ratings, source.users, catalogue, served)
    recipe = served.generation_for(top_k)
    name = checkpoint_version(
        "validation answers",
        {
            "by": version,
            "prompts": prompts["prompt"].tolist(),
            "ratings": source.ratings.version,
            "code": code,
        },
    )
    kept = work_dir / f"{side}-{name}.parquet"
    if kept.exists():
        frame = pd.read_parquet(kept)
    else:
        frame = answer_prompts(
            prompts,
            ratings,
            catalogue,
            partial(load_champion, directory),
            recipe,
            stage=side,
            checkpoint_version=version,
            prompts_version=prompts_version,
            answer_versions=answer_versions(recipe, seed, code),
            top_k=top_k,
            seed=seed,
            device=device,
            progress=progress,
        ).frame
        aside = kept.with_suffix(".partial")
        frame.to_parquet(aside)
        os.replace(aside, kept)
    return ground_responses(frame, prompts, ratings, catalogue, served.grounding, top_k)
