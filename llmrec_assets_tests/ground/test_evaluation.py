from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec_assets.ground import metrics
from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.evaluation import metric_table, user_metrics
from llmrec_assets.ground.recipes import EvaluationRecipe
from llmrec_assets.ground.recommendations import (
    evaluated_prompts,
    recommendation_frame,
    sample_recommendations,
    seen_sets,
    slots,
)
from llmrec_assets.ground.schemas import (
    METRIC_TABLE,
    RECOMMENDATIONS,
    SAMPLE_RECOMMENDATIONS,
    USER_METRICS,
)

RECIPE = EvaluationRecipe(resamples=200)

#: films 1 to 9; 11 is film 1 under a second id
MOVIES = pd.DataFrame(
    {
        "movie_id": [*range(1, 10), 11],
        "title": [f"Film {i}" for i in range(1, 10)] + ["Film 1"],
        "canonical_movie_id": [*range(1, 10), 1],
    }
)


@dataclass(frozen=True)
class FakeMatch:
    movie_id: int | None
    method: str
    similarity: float | None = None


def _ground(texts):
    known = {f"Film {i}": i for i in range(1, 10)}
    return [
        FakeMatch(known[text], "exact") if text in known else FakeMatch(None, "refused")
        for text in texts
    ]


def _prompts(truth: dict[tuple[int, int], list[int]], split: str = "test") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "user_id": [key[0] for key in truth],
            "window_index": [key[1] for key in truth],
            "split": split,
            "cutoff_timestamp": 100,
            "context_movie_ids": [[7, 8]] * len(truth),
            "ground_truth_movie_ids": list(truth.values()),
        }
    )


def _recommendations(
    lists: dict[tuple[int, int], list[int | None]],
    stage: str = "base",
    seen: frozenset[int] = frozenset(),
    information_set: str = "prompt",
) -> pd.DataFrame:
    rows = [
        (*key, stage, "free", information_set, rank, movie and f"Film {movie}", movie,
         "exact" if movie else "missing", None, movie is not None and movie in ids[: rank - 1],
         movie in seen, "p1", None, None)
        for key, ids in lists.items()
        for rank, movie in enumerate(ids, start=1)
    ]  # fmt: skip
    return recommendation_frame(rows).assign(recommendations_version=f"r-{stage}")


def _conforms(table: pd.DataFrame, schema: pa.Schema) -> None:
    assert table.columns.tolist() == schema.names
    pa.Table.from_pandas(table, schema=schema, preserve_index=False).validate(full=True)


def _responses(*texts: str) -> pd.DataFrame:
    return pd.DataFrame(
        {"user_id": range(1, len(texts) + 1), "window_index": 0, "stage": "sft",
         "decoding": "free", "response": texts, "prompts_version": "p1",
         "checkpoint_version": "c1",
         "answer_version": "a1"}
    )  # fmt: skip


def _parse(text: str) -> list[str]:
    return text.split("|") if text else []


def test_slots_by_hand() -> None:
    responses = _responses("Film 1|Film 2|Film 1|Film 3", "nonsense|Film 4", "")
    seen = {(1, 0): frozenset({2}), (2, 0): frozenset(), (3, 0): frozenset({1})}
    calls = []

    def ground(texts):
        calls.append(list(texts))
        return _ground(texts)

    table = slots(responses, _parse, ground, seen, top_k=3)
    _conforms(table, RECOMMENDATIONS)
    assert calls == [["Film 1", "Film 2", "nonsense", "Film 4"]]  # once, each distinct text
    assert table["rank"].tolist() == [1, 2, 3] * 3
    assert table["movie_id"].astype(object).where(table["movie_id"].notna(), None).tolist() == [
        1, 2, 1, None, 4, None, None, None, None,
    ]  # fmt: skip
    assert table["grounding"].tolist() == [
        "exact", "exact", "exact", "refused", "exact", "missing", "missing", "missing", "missing",
    ]  # fmt: skip
    assert np.flatnonzero(table["is_duplicate"]).tolist() == [2]
    assert np.flatnonzero(table["is_seen"]).tolist() == [1]
    assert table["text"].isna().tolist() == [False] * 5 + [True] * 4
    assert set(table["information_set"]) == {"prompt"}


def test_slots_do_not_depend_on_the_batch_and_know_every_window() -> None:
    responses = _responses("Film 1|Film 9", "Film 9|Film 9", "no")
    seen = {(user, 0): frozenset({9}) for user in (1, 2, 3)}
    whole = slots(responses, _parse, _ground, seen, 2)
    parts = [slots(responses.iloc[[i]], _parse, _ground, seen, 2) for i in range(3)]
    pd.testing.assert_frame_equal(whole, pd.concat(parts, ignore_index=True))
    with pytest.raises(KeyError):
        slots(responses, _parse, _ground, {}, 2)
    _conforms(slots(responses.iloc[:0], _parse, _ground, seen, 2), RECOMMENDATIONS)


def test_seen_sets_include_the_cutoff_and_are_canonical() -> None:
    ratings = pd.DataFrame(
        {"user_id": [1, 1, 1, 2], "movie_id": [11, 2, 3, 4], "timestamp": [90, 100, 101, 1]}
    )
    windows = _prompts({(1, 0): [5], (3, 0): [5]})
    assert seen_sets(windows, ratings, MOVIES) == {(1, 0): {1, 2}, (3, 0): frozenset()}
    assert seen_sets(windows, ratings, None)[1, 0] == {11, 2}


def test_evaluated_prompts_are_the_first_test_users() -> None:
    prompts = pd.concat(
        [_prompts({(5, 0): [1], (2, 1): [1], (2, 0): [1]}), _prompts({(1, 0): [1]}, "train")]
    )
    assert evaluated_prompts(prompts, None)["user_id"].tolist() == [2, 2, 5]
    assert evaluated_prompts(prompts, 1)["window_index"].tolist() == [0, 1]


def test_user_metrics_by_hand() -> None:
    prompts = _prompts({(1, 0): [11, 2], (2, 0): [3]})
    table = user_metrics(
        _recommendations({(1, 0): [4, 1, 1], (2, 0): [3, None, 5]}, seen=frozenset({3, 5})),
        prompts,
        MOVIES,
    )
    _conforms(table, USER_METRICS)
    first, second = table.to_dict("records")
    discount = 1 / np.log2(3)
    assert first["ndcg"] == pytest.approx(discount / (1 + discount), abs=1e-12)
    assert (first["precision"], first["recall"]) == (pytest.approx(1 / 3), 0.5)
    assert (first["hits"], first["n_ground_truth"], first["n_duplicate"]) == (1, 2, 1)
    assert (second["hits"], second["ndcg"], second["n_seen"]) == (0, 0, 2)
    assert (second["n_parsed"], second["n_in_catalogue"]) == (2, 2)
    assert table["protocol"].tolist() == ["user-split"] * 2


SLOT = st.none() | st.integers(1, 9)
LISTS = st.lists(
    st.tuples(st.lists(SLOT, min_size=4, max_size=4), st.sets(st.sampled_from(
        MOVIES["movie_id"].tolist()), min_size=1, max_size=6)),
    min_size=1, max_size=6,
)  # fmt: skip


@given(LISTS, st.frozensets(st.integers(1, 9)), st.randoms())
@settings(max_examples=50, deadline=None)
def test_user_metrics_equal_the_definitions_in_any_order(lists, seen, random) -> None:
    prompts = _prompts({(user, 0): sorted(truth) for user, (_, truth) in enumerate(lists)})
    table = _recommendations({(user, 0): ids for user, (ids, _) in enumerate(lists)}, seen=seen)
    found = user_metrics(table, prompts, MOVIES)
    for user, (ids, truth) in enumerate(lists):
        films = {1 if movie_id == 11 else movie_id for movie_id in truth}
        gains = metrics.slot_gains(ids, films, seen)
        row = found.iloc[user]
        for name in ("ndcg", "precision", "recall"):
            expected = getattr(metrics, name)(gains, len(films))
            assert row[name] == pytest.approx(expected, abs=1e-12)
        assert row["hits"] == sum(gains)
    order = list(range(len(table)))
    random.shuffle(order)
    shuffled = user_metrics(table.iloc[order], prompts.iloc[::-1], MOVIES)
    pd.testing.assert_frame_equal(shuffled, found, check_exact=True)


@pytest.mark.parametrize("dtype", ["string", "category"])
def test_user_metrics_do_not_depend_on_how_pandas_keeps_text(dtype: str) -> None:
    prompts = _prompts({(1, 0): [1], (2, 0): [1, 3]})
    table = _recommendations({(1, 0): [1, 2], (2, 0): [3, 2]}).assign(checkpoint_version=None)
    names = ["stage", "decoding", "prompts_version", "checkpoint_version"]
    kept = table.astype(dict.fromkeys(names, dtype))
    found, expected = (user_metrics(some, prompts, MOVIES) for some in (kept, table))
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)
    split = kept.astype({"checkpoint_version": object}).reset_index(drop=True)
    split.loc[1, "checkpoint_version"] = "c1"
    split["checkpoint_version"] = split["checkpoint_version"].astype(dtype)
    with pytest.raises(DataError, match="user 1, window 0 has slots of more than one checkpoint"):
        user_metrics(split, prompts, MOVIES)


def test_a_key_missing_in_a_whole_list_is_named_by_its_row() -> None:
    prompts = _prompts({(1, 0): [1], (2, 0): [1]})
    table = _recommendations({(1, 0): [1, 2], (2, 0): [1, 2]}).reset_index(drop=True)
    for column, missing in (("decoding", None), ("decoding", pd.NA), ("user_id", None)):
        nobodys = table.astype({"user_id": "Int64"})
        nobodys.loc[2:, column] = missing
        with pytest.raises(DataError, match=f"row 2 has no {column}"):
            user_metrics(nobodys, prompts, MOVIES)
    with pytest.raises(DataError, match="user 1, window 0 has no prompt"):
        user_metrics(table, prompts.iloc[:0], MOVIES)


def test_user_metrics_refuse_what_cannot_be_compared() -> None:
    prompts = _prompts({(1, 0): [1], (2, 0): [1]})
    base = _recommendations({(1, 0): [1, 2], (2, 0): [1, 2]})
    with pytest.raises(DataError, match=r"user 2, window 0 has 1 slots"):
        user_metrics(base.iloc[:-1], prompts, MOVIES)
    sft = _recommendations({(1, 0): [1, 2]}, "sft")
    with pytest.raises(DataError, match="answered different windows"):
        user_metrics(pd.concat([base, sft]), prompts, MOVIES)
    with pytest.raises(DataError, match="user 2, window 0 has no prompt"):
        user_metrics(base, prompts.iloc[:1], MOVIES)
    mixed = base.assign(prompts_version=["p0", "p0", "p0", "p1"])
    for column in ("user_id", "decoding"):
        nobodys = base.astype({"user_id": "Int64"})
        nobodys.loc[nobodys.index[1], column] = None
        with pytest.raises(DataError, match=f"row 1 has no {column}"):
            user_metrics(nobodys, prompts, MOVIES)
    with pytest.raises(DataError, match="user 2, window 0 has slots of more than one prompts_v"):
        user_metrics(mixed, prompts, MOVIES)
    _conforms(user_metrics(base.iloc[:0], prompts, MOVIES), USER_METRICS)


def _two_stages() -> pd.DataFrame:
    truth = {(user, 0): [1] for user in range(1, 9)} | {(1, 1): [2], (1, 2): [2]}
    base = _recommendations({key: [9, 8] for key in truth})
    sft = _recommendations({key: [1, 9] if key[0] < 5 else [None, 9] for key in truth}, "sft")
    apex = _recommendations({key: [1, None] for key in truth}, "apex", information_set="history")
    return user_metrics(pd.concat([apex, sft, base]), _prompts(truth), MOVIES)


def test_metric_table_by_hand() -> None:
    table = metric_table(_two_stages(), RECIPE, 0, 2)
    _conforms(table, METRIC_TABLE)
    assert table["stage"].tolist() == ["base", "sft", "apex"]
    base, sft, _ = table.to_dict("records")
    assert (base["n_users"], base["n_windows"], base["hits"], sft["hits"]) == (8, 10, 0, 4)
    # user 1 hits in one of three windows: windows first, then users
    assert sft["ndcg"] == pytest.approx((1 / 3 + 3) / 8, abs=1e-12)
    assert sft["precision"] == pytest.approx((1 / 3 + 3) / 16, abs=1e-12)
    assert sft["ndcg_low"] < sft["ndcg"] < sft["ndcg_high"]
    bound = 1 - 0.025 ** (1 / 8)
    assert (base["ndcg"], base["ndcg_low"], base["ndcg_high"]) == (0, 0, pytest.approx(bound))
    assert sft["parsable"] == (6 * 2 + 4) / 20
    assert base["in_catalogue"] == 1
    assert sft["versus"] == "base"
    assert pd.isna(base["versus"])
    assert np.isnan(base["ndcg_difference"])
    # base scores zero throughout, so the paired difference is sft itself, draw by draw
    for end in ("", "_low", "_high"):
        assert sft[f"ndcg_difference{end}"] == pytest.approx(sft[f"ndcg{end}"], abs=1e-12)
    assert set(table["prompts_version"]) == {"p1"}
    assert table["recommendations_version"].tolist() == ["r-base", "r-sft", "r-apex"]


def test_five_identical_windows_a_user_give_the_interval_of_one() -> None:
    """Intervals are clustered by user: repeating what is known must not narrow them."""
    lists = {user: [1, 2] if user % 3 == 0 else [9, None] for user in range(1, 31)}

    def table(n_windows: int) -> pd.DataFrame:
        keys = [(user, window) for user in lists for window in range(n_windows)]
        both = pd.concat(
            [
                _recommendations({key: lists[key[0]] for key in keys}, "sft"),
                _recommendations({key: [3, lists[key[0]][0]] for key in keys}),
            ]
        )
        truth = _prompts({key: [1, 4] for key in keys})
        return metric_table(user_metrics(both, truth, MOVIES, "temporal"), RECIPE, 0, 2)

    one, five = table(1), table(5)
    assert set(five["protocol"]) == {"temporal"}
    assert five["n_users"].tolist() == one["n_users"].tolist() == [30, 30]
    assert five["n_windows"].tolist() == [150, 150]
    counts = ["n_windows", "hits"]
    pd.testing.assert_frame_equal(five.drop(columns=counts), one.drop(columns=counts), rtol=1e-12)
    assert one["ndcg_low"].max() < one["ndcg_high"].min()  # both have an interval to speak of


def test_a_user_with_many_windows_weighs_as_one() -> None:
    """User 1 hits in each of nine windows, users 2 to 4 miss in their only one."""
    truth = {(1, window): [1] for window in range(9)} | {(user, 0): [1] for user in (2, 3, 4)}
    lists = {key: [1, 9] if key[0] == 1 else [9, 8] for key in truth}
    scores = user_metrics(_recommendations(lists), _prompts(truth), MOVIES)
    (row,) = metric_table(scores, RECIPE, 0, 2).to_dict("records")
    assert row["ndcg"] == pytest.approx(1 / 4, abs=1e-12)
    assert row["precision"] == pytest.approx(1 / 8, abs=1e-12)
    assert (row["n_users"], row["n_windows"], row["hits"]) == (4, 12, 9)


def test_a_window_that_stands_twice_is_refused() -> None:
    prompts = _prompts({(1, 0): [1], (1, 1): [2]})
    lists = _recommendations({(1, 0): [1, 2], (1, 1): [1, 2]})
    with pytest.raises(DataError, match="user 1, window 1 has 4 slots"):
        user_metrics(pd.concat([lists, lists[lists["window_index"] == 1]]), prompts, MOVIES)


def test_metric_table_rows_do_not_depend_on_order_or_company() -> None:
    scores = _two_stages()
    table = metric_table(scores, RECIPE, 0, 2)
    again = metric_table(scores.sample(frac=1, random_state=1), RECIPE, 0, 2)
    pd.testing.assert_frame_equal(again, table, rtol=1e-12)
    alone = metric_table(scores[scores["stage"] == "apex"], RECIPE, 0, 2)
    pd.testing.assert_frame_equal(alone, table.iloc[2:].reset_index(drop=True), rtol=1e-12)
    other = metric_table(scores, RECIPE, 1, 2)
    assert other["ndcg_low"].tolist() != table["ndcg_low"].tolist()


def test_metric_table_without_the_partner_has_no_difference() -> None:
    scores = _two_stages()
    table = metric_table(scores[scores["stage"] == "sft"], RECIPE, 0, 2)
    assert pd.isna(table["versus"][0])
    assert np.isnan(table["ndcg_difference"][0])
    # apex saw more than base: no pair
    table = metric_table(scores, RECIPE, 0, 2, versus={"apex": "base"})
    assert table["versus"].isna().all()
    _conforms(table, METRIC_TABLE)
    _conforms(metric_table(scores.iloc[:0], RECIPE, 0, 2), METRIC_TABLE)


def test_metric_table_refuses_what_cannot_be_compared() -> None:
    scores = _two_stages()
    mixed = scores.assign(prompts_version=scores["stage"].map(lambda s: {"sft": "p0"}.get(s, "p1")))
    with pytest.raises(DataError, match=r"different versions of the prompts .*sft p0"):
        metric_table(mixed, RECIPE, 0, 2)
    fewer = scores[(scores["stage"] != "sft") | (scores["user_id"] != 8)]
    with pytest.raises(DataError, match="different users"):
        metric_table(fewer, RECIPE, 0, 2)
    warmer = scores.assign(answer_version=scores["stage"].map({"base": "a0"}).fillna("a1"))
    with pytest.raises(
        DataError, match=r"not decoded, seeded and grounded alike .*base a0, sft a1"
    ):
        metric_table(warmer, RECIPE, 0, 2)
    classical = warmer.assign(answer_version=None)
    assert len(metric_table(classical, RECIPE, 0, 2)) == scores["stage"].nunique()


def test_sample_recommendations_by_hand() -> None:
    prompts = _prompts({(3, 0): [11, 2], (5, 0): [1]})
    windows = prompts.assign(context_ratings=[[2, 3]] * 2)
    lists = {(5, 0): [1, 2], (3, 0): [1, 1]}
    both = pd.concat(
        [
            _recommendations(lists, "apex", information_set="history"),
            _recommendations(lists, "apex"),
            _recommendations({(5, 0): [1, 2], (3, 0): [None, 2]}, "sft"),
            _recommendations(lists),
        ]
    )
    table = sample_recommendations(prompts, windows, MOVIES, both)
    _conforms(table, SAMPLE_RECOMMENDATIONS)
    assert set(table["user_id"]) == {3}
    assert [
        (row["row"], row["rank"], None if pd.isna(row["title"]) else row["title"], row["is_hit"])
        for row in table.to_dict("records")
    ] == [
        ("liked", 1, "Film 8", False),
        ("disliked", 1, "Film 7", False),
        ("ground truth", 1, "Film 1", False),
        ("ground truth", 2, "Film 2", False),
        ("base", 1, "Film 1", True),
        ("base", 2, "Film 1", False),
        ("sft", 1, None, False),
        ("sft", 2, "Film 2", True),
        ("apex (free, history)", 1, "Film 1", True),
        ("apex (free, history)", 2, "Film 1", False),
        ("apex (free, prompt)", 1, "Film 1", True),
        ("apex (free, prompt)", 2, "Film 1", False),
    ]
    assert set(sample_recommendations(prompts, windows, MOVIES, both, 5)["user_id"]) == {5}
    with pytest.raises(DataError, match="user 4 has no recommendations"):
        sample_recommendations(prompts, windows, MOVIES, both, 4)
    _conforms(
        sample_recommendations(prompts, windows, MOVIES, both.iloc[:0]), SAMPLE_RECOMMENDATIONS
    )
