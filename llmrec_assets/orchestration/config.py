"""Run config: nothing but ``force`` and a seed override. Everything else stands in the recipe."""

import dagster as dg
from pydantic import Field

from llmrec_assets.ground.recipes import Recipe


class ForceConfig(dg.Config):
    """Launch-time option of a step without randomness."""

    force: bool = Field(
        default=False,
        description="Train again although this version is already published; publishes a further "
        "attempt beside it.",
    )


class PromotionConfig(dg.Config):
    """Who challenges a data set's champion, or which earlier champion comes back."""

    challenger: str | None = Field(
        default=None, description="Recipe whose policy challenges, as it is in the store."
    )
    stage: str | None = Field(
        default=None, description="Overrides the recipe's promotion.stage: sft, dpo or rlhf."
    )
    roll_back_to: str | None = Field(
        default=None, description="Version of an earlier champion to put in force again."
    )
    force: bool = Field(
        default=False,
        description="Decide again what was decided, and replace a champion that is damaged.",
    )


class RunConfig(ForceConfig):
    """Launch-time options of a step; the defaults are what a schedule or a backfill uses."""

    seed: int | None = Field(default=None, description="Overrides the recipe's seed.")

    def seed_of(self, recipe: Recipe) -> int:
        """The seed of this run."""
        return recipe.seed if self.seed is None else self.seed
