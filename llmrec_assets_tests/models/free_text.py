"""Free answers to prompts, for tests of what writes them."""

from collections.abc import Sequence
from typing import Any

from llmrec_assets.ground.recipes import GenerationRecipe
from llmrec_assets.models.chat import prompt_ids
from llmrec_assets.models.generation import (
    Response,
    answer_in_batches,
    fitting_batches,
    sampled_answers,
)
from llmrec_assets.models.memory import FittingBatches
from llmrec_assets.models.progress import Progress, silent


def generate_responses(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    recipe: GenerationRecipe,
    *,
    seed: int,
    keys: Sequence[tuple[int, int]] | None = None,
    batches: FittingBatches | None = None,
    progress: Progress = silent,
) -> list[Response]:
    """One response per prompt; ``keys``: by default their positions."""
    asked = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    keys = keys or [(position, 0) for position in range(len(prompts))]
    free = sampled_answers(model, tokenizer, asked, recipe, seed=seed, keys=keys)
    batches = batches or fitting_batches(model, recipe, "generation", progress)
    return answer_in_batches(model, tokenizer, asked, {"free": free}, batches)[0]["free"]
