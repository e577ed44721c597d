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


class RunConfig(ForceConfig):
    """Launch-time options of a step; the defaults are what a schedule or a backfill uses."""

    seed: int | None = Field(default=None, description="Overrides the recipe's seed.")

    def seed_of(self, recipe: Recipe) -> int:
        """The seed of this run."""
        return recipe.seed if self.seed is None else self.seed
