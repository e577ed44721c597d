"""The champion's directory: what lies in it, what it says of itself, its model card.

    README.md            the model card
    champion.json        how it is asked and how it answers (``serving.Served``)
    catalogue.parquet    the films it names
    model/               weights, tokenizer and chat template, for plain transformers
    adapter/             the adapter on top of them, for plain peft; none after SFT alone
    manifest.json        sha256 of every file, what it was made from, how it was promoted

What belongs here: names, reading and writing all but the weights. What does not: weights
(``models.champion``), who becomes champion (``promotion``), publishing (``store``).
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
from pydantic import ValidationError

from llmrec_assets.ground.errors import StoreError
from llmrec_assets.ground.promotion import Promotion
from llmrec_assets.ground.schemas import CATALOGUE
from llmrec_assets.ground.serving import Served
from llmrec_assets.ground.tables import conform, to_frame

MODEL, ADAPTER = "model", "adapter"
_CARD, _SERVED, _CATALOGUE = "README.md", "champion.json", "catalogue.parquet"


def write_served(directory: Path, served: Served, catalogue: pd.DataFrame) -> None:
    """Writes ``champion.json`` and the catalogue."""
    (directory / _SERVED).write_text(served.model_dump_json(indent=2) + "\n", encoding="utf-8")
    pq.write_table(conform(catalogue, CATALOGUE, "catalogue"), directory / _CATALOGUE)


def read_served(directory: Path) -> tuple[Served, pd.DataFrame]:
    """How the champion is asked, and its ``CATALOGUE``.

    Raises:
        StoreError: an older version of this project wrote it, and this one cannot ask it.
    """
    try:
        served = Served.model_validate_json((directory / _SERVED).read_text(encoding="utf-8"))
    except ValidationError as error:
        names = ", ".join(".".join(map(str, e["loc"])) for e in error.errors())
        raise StoreError(
            f"champion {directory.name} was promoted by another version of this project, which "
            f"asked it in ways this one does not know ({names}): promote a recipe again with force"
        ) from error
    return served, to_frame(pq.read_table(directory / _CATALOGUE))


def write_card(directory: Path, served: Served, promotion: Promotion) -> None:
    """Writes the model card."""
    (directory / _CARD).write_text(model_card(directory, served, promotion), encoding="utf-8")


def model_card(directory: Path, served: Served, promotion: Promotion) -> str:
    """The model card, Markdown under the hub's metadata."""
    has_adapter = (directory / ADAPTER).is_dir()
    k = promotion.k
    against = "There was no champion to compare it with: only the checks decided."
    if promotion.difference is not None:
        against = (
            f"Against the champion before it ({promotion.champion_recipe}, "
            f"{promotion.champion_stage}), paired by user: {_points(promotion.difference)} "
            f"[{_points(promotion.difference_low)}, {_points(promotion.difference_high)}] points; "
            f"the margin was {_points(promotion.margin)}."
        )
    test = "not measured under this decoding"
    if promotion.test_ndcg_challenger is not None:
        test = f"NDCG@{k} {100 * promotion.test_ndcg_challenger:.2f} %"
    load = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        *(["from peft import PeftModel"] if has_adapter else []),
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{MODEL}")',
        f'model = AutoModelForCausalLM.from_pretrained("{MODEL}", dtype="auto")',
        *([f'model = PeftModel.from_pretrained(model, "{ADAPTER}")'] if has_adapter else []),
    ]
    lines = [
        "---",
        f"library_name: {'peft' if has_adapter else 'transformers'}",
        "pipeline_tag: text-generation",
        "license: other",
        "---",
        f"# Champion of {served.dataset}",
        "",
        "A film recommender: a language model that reads a user's latest ratings and names films.",
        "",
        f"- data set: {served.dataset}"
        + (" (synthetic: says nothing about films)" if served.dataset == "sample" else ""),
        f"- recipe: {served.recipe}, stage {served.stage}, decoding {served.decoding}",
        f"- base model: {served.base_model}",
        f"- promoted: {promotion.decided_at} ({promotion.decision})",
        "",
        "## Figures",
        "",
        f"Validation users ({promotion.n_users}): NDCG@{k} "
        f"{_percent(promotion.ndcg_challenger)}. {against}",
        "",
        f"Test users, which decided nothing: {test}.",
        "",
        "## Load it",
        "",
        "In this directory, without the project that made it:",
        "",
        "```python",
        *load,
        "```",
        "",
        "`champion.json` says how it is prompted; `catalogue.parquet` lists the films it was asked "
        "to choose from. With the project: `llmrec recommend --dataset "
        f"{served.dataset} --user ID`.",
        "",
        "## Licence",
        "",
        f"The weights come from {served.base_model} and stay under its licence (SmolLM2: "
        "Apache-2.0; Llama 3.2: Llama 3.2 Community License, Built with Llama). They were trained "
        "on, and `catalogue.parquet` holds, data of GroupLens' MovieLens where the data set is one "
        "of theirs: for research, not to be redistributed, to be cited (F. M. Harper and "
        "J. A. Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015).",
        "",
    ]
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.2f} %"


def _points(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:+.2f}"
