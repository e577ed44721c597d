"""Promotion in the graph: who becomes champion, what stops it, what a kill leaves, what serves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import pandas as pd
import pytest

from llmrec_assets import cli
from llmrec_assets.ground import promotion as promoting
from llmrec_assets.ground.completions import render_completion
from llmrec_assets.ground.errors import DataError, LlmrecError, StoreError
from llmrec_assets.ground.promotion import recorded
from llmrec_assets.ground.recommendations import seen_sets
from llmrec_assets.ground.store import read_manifest, verify_checkpoint
from llmrec_assets.models import champion as champion_model
from llmrec_assets.models import contest
from llmrec_assets.models.answers import Answers, answer_prompts
from llmrec_assets.recommend import recommend
from llmrec_assets.runs import promote

if TYPE_CHECKING:
    from conftest import FinishedRun, Home

PARTITION = "sample|tiny"


def challenge(home: Home, instance: dg.DagsterInstance, stage: str = "sft", **options: Any) -> str:
    return promote(
        "sample", challenger="tiny", stage=stage, instance=instance, defs=home.defs(), **options
    )


def last(home: Home) -> dict[str, Any]:
    return recorded(home.store, "sample").iloc[-1].to_dict()


def in_force(home: Home) -> str | None:
    return home.store.current("champion", "sample", "checkpoints")


@pytest.fixture(scope="module")
def first(finished: FinishedRun, new_home: Callable[..., Home]) -> Home:
    """A home where SFT's policy has become the first champion; it is read, never changed."""
    home = new_home(like=finished.home)
    with home.instance() as instance:
        challenge(home, instance)
    return home


@pytest.fixture
def crowned(first: Home, new_home: Callable[..., Home]) -> Any:
    """A copy of that home, and an instance."""
    home = new_home(like=first)
    with home.instance() as instance:
        yield home, instance


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch, finished: FinishedRun) -> Callable[..., None]:
    """``quality(challenger=…, champion=…)``: how many films of the ground truth each side's lists
    begin with. All lists keep the contract: the other films are unseen and not in it."""
    store = finished.home.store
    prompts = store.read_table("prompts", PARTITION).frame
    ratings = store.read_table("ratings", "sample").frame
    truth = {
        (row["user_id"], row["window_index"]): row["ground_truth_movie_ids"]
        for row in prompts.to_dict("records")
    }

    def set_quality(**hits: int) -> None:
        def answers(
            asked: pd.DataFrame, _: Any, movies: pd.DataFrame, *rest: Any, **options: Any
        ) -> Answers:
            title_of = dict(zip(movies["movie_id"], movies["title"], strict=True))
            seen = seen_sets(asked, ratings, movies)
            texts = []
            for key in zip(asked["user_id"], asked["window_index"], strict=True):
                good = truth[key][: hits[options["stage"]]]
                free = [i for i in title_of if i not in seen[key] and i not in set(truth[key])]
                films = [*good, *free][: options["top_k"]]
                texts.append(render_completion([title_of[film] for film in films]))
            frame = asked[["user_id", "window_index"]].assign(
                stage=options["stage"],
                decoding="ranked",
                response=texts,
                n_prompt_tokens=1,
                n_response_tokens=1,
                finished=True,
                checkpoint_version=options["checkpoint_version"],
                prompts_version=options["prompts_version"],
                answer_version="a",
            )
            return Answers(frame, {}, ((),) * len(frame))

        monkeypatch.setattr(champion_model, "answer_prompts", answers)

    return set_quality


# -- decisions ----------------------------------------------------------------------------------


def test_the_first_champion_is_published_recorded_and_described(
    first: Home, finished: FinishedRun
) -> None:
    directory = first.store.checkpoint("champion", "sample")
    assert {path.name for path in directory.iterdir()} == {
        *("README.md", "champion.json", "catalogue.parquet", "model", "manifest.json"),
    }
    row = last(first)
    assert (row["decision"], row["in_force"]) == ("first", directory.name)
    assert pd.isna(row["champion"]) and pd.isna(row["loser"]) and pd.isna(row["difference"])
    prompts = finished.home.store.read_table("prompts", PARTITION).frame
    assert row["n_users"] == (prompts["split"] == "validation").sum()
    table = finished.home.store.read_table("metric_table", PARTITION).frame
    tested = table[(table["stage"] == "sft") & (table["decoding"] == "ranked")]
    assert row["test_ndcg_challenger"] == tested["ndcg"].item()
    manifest = read_manifest(directory)
    assert manifest["determinants"]["sft_checkpoint"] == first.store.current(
        "sft_checkpoint", PARTITION, "checkpoints"
    )
    assert manifest["facts"]["promotion"]["decided_at"] == row["decided_at"]
    card = (directory / "README.md").read_text()
    for said in ("recipe: tiny, stage sft, decoding ranked", "synthetic", "Licence", "MovieLens"):
        assert said in card
    assert not (first.location / "work" / "champion" / "sample" / directory.name).exists()


def test_the_record_is_seen_by_sql(first: Home) -> None:
    done = first.llmrec("sql", "select dataset, decision, challenger_stage from promotions")
    assert "sample" in done.stdout and "first" in done.stdout and "sft" in done.stdout


def test_the_materializations_and_the_check_are_in_the_instance(
    finished: FinishedRun, new_home: Callable[..., Home]
) -> None:
    home = new_home(like=finished.home)
    with home.instance() as instance:
        run_id = challenge(home, instance)
        events = [r.dagster_event for r in instance.all_logs(run_id) if r.dagster_event]
    made = {
        e.event_specific_data.materialization.asset_key.to_user_string(): (
            e.event_specific_data.materialization
        )
        for e in events
        if e.is_step_materialization
    }
    assert set(made) == {"champion", "promotions"}
    assert {event.partition for event in made.values()} == {"sample"}
    facts = made["champion"].metadata
    assert facts["decision"].value == "first" and "ndcg_challenger" in facts
    assert made["champion"].tags["dagster/data_version"] == in_force(home)
    (check,) = [
        e.event_specific_data
        for e in events
        if e.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION
    ]
    assert check.passed and check.check_name == "challenger_keeps_every_check"


def test_an_identical_challenger_decides_nothing_and_needs_no_device(
    crowned: tuple[Home, dg.DagsterInstance], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr(contest, "pack_champion", refuse)
    home, instance = crowned
    before = home.current("sample"), in_force(home)
    challenge(home, instance)
    challenge(home, instance, force=True)
    assert (home.current("sample"), in_force(home)) == before


def test_a_worse_challenger_does_not_replace_the_champion(
    crowned: tuple[Home, dg.DagsterInstance], quality: Callable[..., None]
) -> None:
    home, instance = crowned
    before = in_force(home)
    quality(challenger=0, champion=2)
    challenge(home, instance, "dpo")
    row = last(home)
    assert (row["decision"], row["in_force"], in_force(home)) == ("kept", before, before)
    assert (row["loser"], row["challenger_stage"]) == (row["challenger"], "dpo")
    assert row["difference_high"] < 0 and row["ndcg_challenger"] == 0 < row["ndcg_champion"]
    verify_checkpoint(home.store.checkpoint("champion", "sample"))
    # decided is decided: nothing is answered again, unless asked to
    challenge(home, instance, "dpo")
    assert len(recorded(home.store, "sample")) == 2
    challenge(home, instance, "dpo", force=True)
    assert recorded(home.store, "sample")["decision"].tolist() == ["first", "kept", "kept"]


def test_one_no_better_by_chance_does_not_replace_it_either(
    crowned: tuple[Home, dg.DagsterInstance],
) -> None:
    """The real tiny policies: both know nothing."""
    home, instance = crowned
    before = in_force(home)
    challenge(home, instance, "rlhf")
    row = last(home)
    assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    assert (row["decision"] == "promoted") == (row["difference_low"] > -row["margin"])
    assert in_force(home) == row["in_force"]
    assert (row["in_force"] == before) == (row["decision"] == "kept")


def test_a_better_challenger_replaces_it_and_a_roll_back_brings_it_back(
    crowned: tuple[Home, dg.DagsterInstance], quality: Callable[..., None]
) -> None:
    home, instance = crowned
    old = in_force(home)
    quality(challenger=2, champion=0)
    challenge(home, instance, "dpo")
    row = last(home)
    new = in_force(home)
    assert (row["decision"], row["in_force"], row["loser"]) == ("promoted", new, old)
    assert row["difference_low"] > 0 and row["users_left_out"] == 0
    assert (home.store.checkpoint("champion", "sample") / "adapter").is_dir()

    promote("sample", roll_back_to=old, instance=instance, defs=home.defs())
    assert in_force(home) == old
    row = last(home)
    assert (row["decision"], row["in_force"], row["loser"]) == ("rolled back", old, new)
    # the schedule that retrains must not bring back what was rolled back
    challenge(home, instance, "dpo")
    assert in_force(home) == old and len(recorded(home.store, "sample")) == 3
    # who asks for it gets it, and its files are those that were published
    challenge(home, instance, "dpo", force=True)
    assert (in_force(home), last(home)["decision"]) == (new, "promoted")


def test_a_roll_back_to_what_was_never_champion_says_what_there_is(
    crowned: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = crowned
    with pytest.raises(DataError, match="there are none beside the current"):
        promote("sample", roll_back_to="abc", instance=instance, defs=home.defs())


def test_users_that_trained_the_champion_compare_nothing(
    crowned: tuple[Home, dg.DagsterInstance], quality: Callable[..., None]
) -> None:
    """Another recipe may split the users otherwise: whom the champion has learnt is left out."""
    home, instance = crowned
    quality(challenger=2, champion=0)
    manifest = home.store.checkpoint("champion", "sample") / "manifest.json"
    facts = json.loads(manifest.read_text())
    prompts = home.store.read_table("prompts", PARTITION).frame
    users = prompts.loc[prompts["split"] == "validation", "user_id"].unique().tolist()
    facts["facts"]["trained_user_ids"] = users[:10]
    manifest.write_text(json.dumps(facts))
    challenge(home, instance, "dpo")
    row = last(home)
    assert (row["users_left_out"], row["n_users"]) == (10, len(users) - 10)

    champion = home.store.checkpoint("champion", "sample") / "manifest.json"
    facts = json.loads(champion.read_text())
    facts["facts"]["trained_user_ids"] = users
    champion.write_text(json.dumps(facts))
    before = in_force(home)
    challenge(home, instance, "rlhf")
    row = last(home)
    assert (row["decision"], row["n_users"], in_force(home)) == ("kept", 0, before)
    assert "give both recipes the same seed and splits" in row["reason"]


# -- what stops it ------------------------------------------------------------------------------


def a_test_user_in_the_training(home: Home) -> None:
    splits = home.store.read_table("user_splits", PARTITION).frame
    stranger = int(splits.loc[splits["split"] == "test", "user_id"].iloc[0])
    path = home.store.checkpoint("dpo_checkpoint", PARTITION) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["facts"]["trained_user_ids"].append(stranger)
    path.write_text(json.dumps(manifest))


def a_leak_in_the_windows(home: Home) -> None:
    windows = home.store.read_table("interaction_windows", PARTITION).frame
    cells = windows["context_movie_ids"].tolist()
    cells[0] = [*cells[0][:-1], windows["ground_truth_movie_ids"].iloc[0][0]]
    home.store.publish_table(
        "interaction_windows", PARTITION, windows.assign(context_movie_ids=cells)
    )


def a_prompt_that_tells_the_answer(home: Home) -> None:
    prompts = home.store.read_table("prompts", PARTITION).frame
    prompts["prompt"] = prompts["prompt"] + prompts["completion"]
    home.store.publish_table("prompts", PARTITION, prompts)


def pairs_of_other_users(home: Home) -> None:
    """The very version that DPO names: a table of that name with other rows in it."""
    pairs = home.store.read_table("preference_pairs", PARTITION)
    path = Path(str(home.store.table_path("preference_pairs", PARTITION, pairs.version)))
    changed = pairs.frame.assign(split="validation")
    version = home.store.publish_table("preference_pairs", PARTITION, changed)
    shutil.copyfile(path.with_name(f"{version}.parquet"), path)


@pytest.mark.parametrize(
    ("plant", "check"),
    [
        (a_test_user_in_the_training, "trained_on_training_users_only, dpo_checkpoint"),
        (a_leak_in_the_windows, "no_leak"),
        (a_prompt_that_tells_the_answer, "prompts_show_their_windows_only"),
        (pairs_of_other_users, "pairs_keep_the_split"),
    ],
)
def test_a_planted_leak_stops_promotion_and_is_recorded(
    crowned: tuple[Home, dg.DagsterInstance],
    quality: Callable[..., None],
    plant: Callable[[Home], None],
    check: str,
) -> None:
    home, instance = crowned
    before = in_force(home)
    plant(home)
    quality(challenger=2, champion=0)
    with pytest.raises(LlmrecError, match="challenger_keeps_every_check failed"):
        challenge(home, instance, "dpo")
    row = last(home)
    assert (row["decision"], in_force(home)) == ("refused", before)
    assert row["reason"].startswith(check)
    verify_checkpoint(home.store.checkpoint("champion", "sample"))
    (run,) = instance.get_runs()
    failed = [
        r.dagster_event.event_specific_data
        for r in instance.all_logs(run.run_id)
        if r.dagster_event
        and r.dagster_event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION
    ]
    assert [result.passed for result in failed] == [False]


def test_lists_that_break_the_contract_stop_promotion(
    crowned: tuple[Home, dg.DagsterInstance], monkeypatch: pytest.MonkeyPatch
) -> None:
    def repeated(*args: Any, **options: Any) -> Answers:
        answers = answer_prompts(*args, **options)
        titles = json.loads(answers.frame["response"].iloc[0])
        texts = [render_completion([titles[0]] * len(titles))] * len(answers.frame)
        return Answers(answers.frame.assign(response=texts), {}, answers.log_probabilities)

    monkeypatch.setattr(champion_model, "answer_prompts", repeated)
    home, instance = crowned
    before = in_force(home)
    with pytest.raises(LlmrecError, match="keeps_the_contract"):
        challenge(home, instance, "dpo")
    assert (last(home)["decision"], in_force(home)) == ("refused", before)


def test_a_leak_stops_the_first_champion_too(
    copied: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = copied
    a_leak_in_the_windows(home)
    with pytest.raises(LlmrecError, match="no_leak"):
        challenge(home, instance)
    assert in_force(home) is None
    row = last(home)
    assert row["decision"] == "refused" and pd.isna(row["in_force"])


def test_asked_nothing_or_two_things_it_says_what_to_ask(
    crowned: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = crowned
    for options in ({}, {"challenger": "tiny", "roll_back_to": "abc"}):
        with pytest.raises(DataError, match="name a recipe as challenger in the run config, or a"):
            promote("sample", instance=instance, defs=home.defs(), **options)
    with pytest.raises(StoreError, match=r"prompts has not been materialized for sample"):
        promote("sample", challenger="quickstart", instance=instance, defs=home.defs())


def test_a_damaged_champion_is_named_and_replaced_on_request(
    crowned: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = crowned
    old = in_force(home)
    weights = home.store.checkpoint("champion", "sample") / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(StoreError, match=r"model/model.safetensors does not match its manifest"):
        challenge(home, instance)
    challenge(home, instance, force=True)
    row = last(home)
    assert (in_force(home), row["in_force"]) == (f"{old}-2", f"{old}-2")
    assert "is damaged" in row["reason"]
    verify_checkpoint(home.store.checkpoint("champion", "sample"))


# -- kills --------------------------------------------------------------------------------------


def generously(
    opened: Any, *rest: Any, margin: float, real: Any = promoting.judged, **o: Any
) -> Any:
    """Any challenger wins."""
    return real(opened, *rest, margin=1.0, **o)


#: A process that ends as if killed where ``MOMENT`` says, in the midst of a promotion to DPO.
KILLED = """
import os
from llmrec_assets.ground import promotion
from llmrec_assets.ground.store import Store
from llmrec_assets.models import contest
from llmrec_assets.runs import promote

def die(*args, **options):
    os._exit(9)

def generously(opened, *rest, margin, real=promotion.judged, **options):
    return real(opened, *rest, margin=1.0, **options)

promotion.judged = generously
moment = os.environ["MOMENT"]
if moment == "packed":
    contest.validation_lists = die
elif moment == "written":
    Store._point = lambda self, directory, version, real=Store._point: (
        die() if "champion" in str(directory) else real(self, directory, version)
    )
else:
    promotion.with_row = die
promote("sample", challenger="tiny", stage="dpo")
"""


@pytest.mark.parametrize("moment", ["packed", "written", "published"])
def test_a_kill_leaves_a_whole_champion_and_the_next_run_ends_it(
    crowned: tuple[Home, dg.DagsterInstance], moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, instance = crowned
    old = in_force(home)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED],
        env=home.environment(MOMENT=moment),
        capture_output=True,
        text=True,
    )
    assert killed.returncode == 9, killed.stderr[-2000:]
    assert (in_force(home) == old) == (moment != "published")
    verify_checkpoint(home.store.checkpoint("champion", "sample"))
    assert recorded(home.store, "sample")["decision"].tolist() == ["first"]
    monkeypatch.setattr(promoting, "judged", generously)
    challenge(home, instance, "dpo")
    assert recorded(home.store, "sample")["decision"].tolist() == ["first", "promoted"]
    assert last(home)["in_force"] == in_force(home) != old
    assert last(home)["loser"] == old
    verify_checkpoint(home.store.checkpoint("champion", "sample"))


# -- what serves --------------------------------------------------------------------------------


def ask(home: Home, **options: Any) -> Any:
    resources = home.defs().resources
    return recommend("sample", storage=resources["storage"], gpu=resources["gpu"], **options)


def test_it_recommends_unseen_films_with_scores_and_reasons(first: Home) -> None:
    found = ask(first, users=[7, 3], k=4)
    frame = found.frame
    assert list(frame) == ["user", "rank", "movie_id", "title", "score", "reason"]
    assert frame["user"].tolist() == ["7"] * 4 + ["3"] * 4
    assert frame["rank"].tolist() == [1, 2, 3, 4] * 2
    ratings = first.store.read_table("ratings", "sample").frame
    movies = first.store.read_table("movies", "sample").frame
    title_of = dict(zip(movies["movie_id"], movies["title"], strict=True))
    for user, rows in frame.groupby("user"):
        history = ratings[ratings["user_id"] == int(str(user))]
        assert not set(rows["movie_id"]) & set(history["movie_id"])
        assert rows["movie_id"].nunique() == 4
        assert rows["score"].is_monotonic_decreasing and (rows["score"] < 0).all()
        liked = {title_of[i] for i in history.loc[history["rating"] >= 3, "movie_id"]}
        for row in rows.to_dict("records"):
            assert title_of[row["movie_id"]] == row["title"]
            assert any(title in row["reason"] for title in liked)
    assert found.champion == in_force(first) and "logarithm" in found.score
    # the first of a longer list are the shorter list, and alone a user gets the same
    for k in (1, 2):
        alone = ask(first, users=[7], k=k).frame
        assert alone["movie_id"].tolist() == frame["movie_id"].tolist()[:k]
        assert alone["score"].tolist() == pytest.approx(frame["score"].tolist()[:k], abs=1e-4)


def test_a_history_in_a_file_gets_what_the_same_user_would(first: Home, tmp_path: Path) -> None:
    """Same ratings without a profile; the films are out of the same catalogue."""
    ratings = first.store.read_table("ratings", "sample").frame
    own = ratings[ratings["user_id"] == 7].assign(user_id="anna")
    own.to_csv(tmp_path / "own.csv", index=False)
    found = ask(first, file=tmp_path / "own.csv", k=3).frame
    assert found["user"].tolist() == ["anna"] * 3
    assert not set(found["movie_id"]) & set(own["movie_id"])


def test_what_cannot_be_answered_is_said(
    first: Home, tmp_path: Path, finished: FinishedRun
) -> None:
    with pytest.raises(DataError, match="user 9999 is not in sample"):
        ask(first, users=[9999])
    with pytest.raises(DataError, match=r"has rated all but .* ask for at most"):
        ask(first, users=[7], k=259)
    with pytest.raises(DataError, match="ask for at least 1"):
        ask(first, users=[7], k=0)
    with pytest.raises(DataError, match="name either users"):
        ask(first)
    with pytest.raises(DataError, match=r"sample has no champion yet.*llmrec promote"):
        ask(finished.home, users=[7])


def test_the_command_line_promotes_and_recommends(
    finished: FinishedRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished.home.location, os.environ["LLMREC_HOME"])
    assert cli.main(["recommend", "--user", "7"]) == 1
    assert "sample has no champion yet" in capsys.readouterr().err
    assert cli.main(["promote", "--recipe", "tiny"]) == 0
    assert "first: there is no champion to compare with" in capsys.readouterr().out
    assert cli.main(["promote", "--recipe", "tiny"]) == 0
    assert "nothing new to decide" in capsys.readouterr().out
    for kind in ("table", "json", "csv"):
        assert cli.main(["recommend", "--user", "7", "--k", "3", "--format", kind]) == 0
        printed = capsys.readouterr()
        if kind == "json":
            answer = json.loads(printed.out)
            assert [row["rank"] for row in answer["recommendations"]] == [1, 2, 3]
            assert {"dataset", "champion", "score", "reason"} <= set(answer)
        elif kind == "csv":
            assert printed.out.splitlines()[0] == "user,rank,movie_id,title,score,reason"
            assert len(printed.out.splitlines()) == 4 and "logarithm" in printed.err
        else:
            assert "synthetic data" in printed.out and "logarithm" in printed.err
    assert cli.main(["recommend", "--user", "9999"]) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("llmrec: ")]
    assert "user 9999 is not in sample" in line
    assert cli.main(["promote", "--roll-back-to", "abc"]) == 1
    assert "cannot be champion of sample again" in capsys.readouterr().err.splitlines()[-1]
