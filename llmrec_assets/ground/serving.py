"""Questions to a policy outside the split: windows of any users, put into a recipe's words.

What belongs here: what a policy is asked with (its prompts, its catalogue, its settings) and the
prompts for given users and cut-offs. What does not: drawing windows to train and to test on
(``windows``), reading users' own histories (``histories``), answering (the models floor).
"""

from __future__ import annotations

import pandas as pd

from llmrec_assets.ground.prompts import render_prompts
from llmrec_assets.ground.recipes import (
    DecodingName,
    GenerationRecipe,
    GroundingRecipe,
    PromptRecipe,
    Recipe,
    Section,
    WindowRecipe,
)

#: What names a question: whose, which, and what its user's history ends with.
ASKED = ["user_id", "window_index", "cutoff_timestamp"]


class Served(Section):
    """How a policy is asked and how it answers: the parts of its recipe that it needs for life.

    ``generation`` names one decoding, the one it serves with.
    """

    dataset: str
    recipe: str
    stage: str
    base_model: str
    seed: int
    prompts: PromptRecipe
    windows: WindowRecipe
    generation: GenerationRecipe
    grounding: GroundingRecipe

    @classmethod
    def of(cls, recipe: Recipe, dataset: str, stage: str) -> Served:
        """The policy of ``stage``, served by the decoding that ``recipe.promotion`` names."""
        alone = {"decodings": (recipe.promotion.decoding,), "candidates": "none"}
        return cls(
            dataset=dataset,
            recipe=recipe.name,
            stage=stage,
            base_model=recipe.base_model.label,
            seed=recipe.seed,
            prompts=recipe.prompts,
            windows=recipe.windows,
            generation=recipe.generation.model_copy(update=alone),
            grounding=recipe.grounding,
        )

    @property
    def decoding(self) -> DecodingName:
        return self.generation.decodings[0]

    def generation_for(self, k: int) -> GenerationRecipe:
        """Settings with beams enough for lists of ``k``."""
        return self.generation.model_copy(update={"beams": max(self.generation.beams, k)})


def serving_prompts(
    asked: pd.DataFrame,
    ratings: pd.DataFrame,
    users: pd.DataFrame,
    catalogue: pd.DataFrame,
    served: Served,
) -> pd.DataFrame:
    """The prompt for each question, worded and cut as the policy was trained: for a window of its
    own recipe it is that window's prompt.

    Args:
        asked: the columns ``ASKED``.
        ratings: ``RATINGS`` of their users. Films that the catalogue lacks are not shown.
        users: ``USERS``, for their profiles.
        catalogue: ``CATALOGUE`` of the policy.

    Returns:
        ``PROMPTS`` in the order of ``asked``, split ``asked``, without ground truth.
    """
    known = ratings[ratings["movie_id"].isin(catalogue["movie_id"])]
    known = known[known["user_id"].isin(asked["user_id"])]
    known = known.sort_values(["timestamp", "movie_id", "rating"], kind="stable")
    by_user = {int(str(user)): rows for user, rows in known.groupby("user_id")}
    windows = asked[ASKED].reset_index(drop=True)
    films, stars = [], []
    keys = zip(windows["user_id"].tolist(), windows["cutoff_timestamp"].tolist(), strict=True)
    for user, cutoff in keys:
        rows = by_user.get(user, known.iloc[:0])
        rows = rows[rows["timestamp"] <= cutoff].tail(served.windows.window_size)
        films.append(rows["movie_id"].tolist())
        stars.append(rows["rating"].tolist())
    windows = windows.assign(split="asked")
    windows["context_movie_ids"] = pd.Series(films, dtype=object)
    windows["context_ratings"] = pd.Series(stars, dtype=object)
    windows["ground_truth_movie_ids"] = pd.Series([[] for _ in films], dtype=object)
    return render_prompts(windows, users, catalogue, served.prompts, served.windows)
