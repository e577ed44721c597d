"""``sample | tiny`` with invented titles, beside the same partition with the real ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import dagster as dg
import pandas as pd
import pytest

from llmrec_assets.ground import catalogue
from llmrec_assets.ground.prompts import render_prompts
from llmrec_assets.ground.recipes import Recipe, load_recipe
from llmrec_assets.ground.titles import normalise_title
from llmrec_assets.orchestration import partitions

if TYPE_CHECKING:
    from conftest import FinishedRun, Home

PARTITION = "sample|tiny"
ASKED_AGAIN = (
    *("catalogue", "interaction_windows", "prompts", "sft_checkpoint", "sft_responses"),
    *("sft_recommendations", "sampled_responses", "preference_pairs", "baseline_recommendations"),
    *("user_metrics", "comparisons", "group_metrics", "beyond_accuracy", "metric_table"),
    *("sample_recommendations", "report"),
)


def anonymised(name: str) -> Recipe:
    recipe = load_recipe(name)
    prompts = recipe.prompts.model_copy(update={"titles": "invented"})
    return recipe.model_copy(update={"prompts": prompts})


def frame(home: Home, asset: str, partition: str = PARTITION) -> pd.DataFrame:
    return home.store.read_table(asset, partition).frame


@pytest.fixture(scope="module")
def invented(finished: FinishedRun, new_home: Any) -> Iterator[tuple[Home, dg.DagsterInstance]]:
    """The finished run's home, materialized again under invented titles."""
    home = new_home(like=finished.home)
    with pytest.MonkeyPatch.context() as patch, home.instance() as instance:
        patch.setattr(partitions, "load_recipe", anonymised)
        result = home.materialize(instance, *ASKED_AGAIN)
        assert result.success
        yield home, instance


def test_with_real_titles_the_catalogue_is_movies(finished: FinishedRun) -> None:
    store = finished.home.store
    movies, catalogue = (store.current(*place, kind="tables") for place in
                         (("movies", "sample"), ("catalogue", PARTITION)))  # fmt: skip
    assert catalogue == movies  # the hash of the content


def test_every_text_shows_invented_titles_and_no_real_one(invented) -> None:
    home, _ = invented
    shown = set(frame(home, "catalogue")["title"])
    real = set(frame(home, "movies", "sample")["title"])
    assert len(shown) == len(real) and not shown & real
    prompts = frame(home, "prompts")
    texts = [*prompts["prompt"], *prompts["completion"], *frame(home, "preference_pairs")["chosen"]]
    lists = frame(home, "sample_recommendations")
    texts += [*lists["text"].dropna(), *lists["title"].dropna()]
    everything = "\n".join(texts)
    assert not [title for title in real if title in everything]
    named = {title for text in prompts["completion"] for title in re.findall('"([^"]+)"', text)}
    assert named and named <= shown
    page = (home.store.checkpoint("report", PARTITION) / "report.md").read_text()
    assert not [title for title in real if title in page]


def test_the_truth_written_out_grounds_to_the_same_ids(invented) -> None:
    from llmrec_assets.ground.scoring import ResponseScorer

    home, _ = invented
    recipe, prompts = load_recipe("tiny"), frame(home, "prompts")
    catalogue = frame(home, "catalogue")
    scorer = ResponseScorer(
        prompts, frame(home, "ratings", "sample"), catalogue, recipe.grounding, recipe.windows.top_k
    )
    for row in prompts.head(40).to_dict("records"):
        assert scorer.score(row["user_id"], row["window_index"], row["completion"]) == 1


def test_windows_and_classical_lists_know_no_titles_and_stay_as_they_were(
    invented, finished: FinishedRun
) -> None:
    home, _ = invented
    assert home.current()["interaction_windows"] == finished.home.current()["interaction_windows"]
    assert home.current()["prompts"] != finished.home.current()["prompts"]
    columns = ["user_id", "window_index", "information_set", "rank", "movie_id", "is_seen"]
    before, after = (frame(h, "baseline_recommendations") for h in (finished.home, home))
    pd.testing.assert_frame_equal(before[columns], after[columns])
    assert not set(map(normalise_title, before["text"])) & set(map(normalise_title, after["text"]))
    tables = [
        frame(h, "metric_table").query("stage == 'popularity'") for h in (finished.home, home)
    ]
    pd.testing.assert_series_equal(tables[0]["ndcg"], tables[1]["ndcg"], check_index=False)


@pytest.mark.parametrize(("column", "row"), [("prompt", 0), ("completion", 3)])
def test_a_planted_real_title_stops_the_prompts(
    invented, monkeypatch: pytest.MonkeyPatch, column: str, row: int
) -> None:
    home, instance = invented
    before = home.current()["prompts"]
    title = frame(home, "movies", "sample")["title"].iloc[0]

    def planted(*args: Any) -> pd.DataFrame:
        frame = render_prompts(*args)
        frame.loc[row, column] = f"{frame.loc[row, column]} {title}"
        return frame

    monkeypatch.setattr("llmrec_assets.ground.prompts.render_prompts", planted)
    result = home.materialize(instance, "prompts")
    assert not result.success
    failed = [e.check_name for e in result.get_asset_check_evaluations() if not e.passed]
    assert failed == ["no_real_title_in_anonymised_prompts"]
    assert home.current()["prompts"] == before


def test_real_titles_in_the_catalogue_stop_it(invented, monkeypatch: pytest.MonkeyPatch) -> None:
    home, instance = invented
    before = home.current()["catalogue"]
    monkeypatch.setattr(catalogue, "shown_catalogue", lambda movies, *rest: movies)
    assert not home.materialize(instance, "catalogue").success
    assert home.current()["catalogue"] == before


def test_memorisation_is_a_table_of_counts(finished: FinishedRun) -> None:
    table = frame(finished.home, "memorisation")
    assert set(table["n"]) == {load_recipe("tiny").probes.n}
    assert len(table) == 21  # two title tasks and one of ratings: 2 + 2 + 3 matches, 3 rows each
    assert set(table["task"]) == {"next title", "title of id", "next rating"}
    assert table["share"].between(table["low"], table["high"]).all()
    base = finished.home.store.current("base_model", "tiny", "checkpoints")
    assert set(table["checkpoint_version"]) == {base}
    titles = frame(finished.home, "movies", "sample")["title"]
    assert not set(titles) & set(map(str, table.to_numpy().ravel()))
