"""Each check must find the leak planted for it, and nothing in clean tables."""

import pandas as pd
import pytest

from llmrec_assets.ground.leaks import prompt_problems, user_split_problems, window_problems
from llmrec_assets.ground.recipes import WindowRecipe, WindowsPerUser

RECIPE = WindowRecipe(
    window_size=2, min_per_class=1, top_k=2, windows_per_user=WindowsPerUser(test=2)
)
TITLES = {1: "Heat (1995)", 2: "Body Heat (1981)", 3: "Net, The (1995)", 4: "unknown",
          5: "Crash (1996)", 6: "Emma (1996)", 15: "Crash (1996)"}  # fmt: skip


def _movies() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "movie_id": list(TITLES),
            "title": list(TITLES.values()),
            "canonical_movie_id": [5 if i == 15 else i for i in TITLES],
            "genres": [["Drama", "unknown"] if i == 2 else [] for i in TITLES],
        }
    )


def _ratings() -> pd.DataFrame:
    rows = [(1, 3, 1, 5), (1, 5, 4, 10), (1, 2, 5, 20), (1, 6, 2, 30), (1, 1, 5, 40),
            (1, 15, 5, 50), (1, 4, 3, 60)]  # fmt: skip
    return pd.DataFrame(rows, columns=["user_id", "movie_id", "rating", "timestamp"])


def _splits() -> pd.DataFrame:
    return pd.DataFrame({"user_id": [1, 2], "split": ["test", "train"]})


def _windows() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "user_id": [1, 1],
            "window_index": [0, 1],
            "split": ["test", "test"],
            "cutoff_timestamp": [20, 30],
            "n_history": [3, 4],
            "n_valid_cutoffs": [5, 5],
            "context_movie_ids": [[5, 2], [2, 6]],
            "context_ratings": [[4, 5], [5, 2]],
            "ground_truth_movie_ids": [[1, 4], [1, 4]],
        }
    )


def _prompts() -> pd.DataFrame:
    texts = ["Liked: Crash (1996); Body Heat (1981) [Drama, unknown].", "Liked: Body Heat (1981)."]
    return _windows()[
        ["user_id", "window_index", "split", "cutoff_timestamp",
         "context_movie_ids", "ground_truth_movie_ids"]
    ].assign(prompt=texts)  # fmt: skip


def _check(windows: pd.DataFrame, **other) -> str:
    given = {
        "ratings": _ratings(), "user_splits": _splits(), "canonical": _movies(), "recipe": RECIPE
    } | other  # fmt: skip
    return "\n".join(window_problems(windows, **given))


def _with(table: pd.DataFrame, column: str, value, row: int = 0) -> pd.DataFrame:
    table = table.copy()
    table[column] = table[column].astype("object")
    table.at[row, column] = value
    return table


def test_clean_tables_have_no_problem() -> None:
    assert user_split_problems(_splits()) == []
    assert _check(_windows()) == ""
    assert prompt_problems(_prompts(), _windows(), _movies()) == []
    assert _check(_windows().iloc[:0]) == ""


def test_a_user_in_two_splits() -> None:
    twice = pd.DataFrame({"user_id": [1, 1, 2], "split": ["test", "train", "test"]})
    assert user_split_problems(twice) == ["user 1 stands in 2 splits: test, train"]
    assert "user 1 stands in 2 splits" in _check(_windows(), user_splits=twice)
    assert user_split_problems(pd.DataFrame({"user_id": [1], "split": ["tset"]})) == [
        "unknown split 'tset'"
    ]


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("context_movie_ids", [2, 6], "context holds films rated after the cut-off: [6]"),
        ("context_movie_ids", [2, 5], "context is not the last 2 films"),
        ("context_movie_ids", [2], "context is not the last 2 films"),
        ("context_ratings", [5, 4], "context_ratings are not"),
        ("n_history", 4, "n_history is 4, 3 are not after the cut-off"),
        ("cutoff_timestamp", 21, "nothing was rated at the cut-off 21"),
        ("cutoff_timestamp", 60, "0 liked films follow"),
        ("ground_truth_movie_ids", [2, 1], "ground truth 2 was not rated after the cut-off"),
        ("ground_truth_movie_ids", [6, 1], "ground truth 6 was not liked"),
        ("ground_truth_movie_ids", [1, 15], "ground truth 15 is a film of the history"),
        ("ground_truth_movie_ids", [1, 1], "ground truth repeats a film"),
        ("ground_truth_movie_ids", [4, 1], "ground truth is not the next 2 liked films"),
        ("ground_truth_movie_ids", [1], "ground truth is not the next 2 liked films"),
        ("split", "train", "split is 'train', the user's is 'test'"),
        ("window_index", 1, "windows are not numbered 0 to 1"),
        ("cutoff_timestamp", 30, "cut-offs repeat or are not numbered by time"),
    ],
)
def test_a_planted_window_leak_is_found(column, value, problem) -> None:
    assert problem in _check(_with(_windows(), column, value))


#: half of the ratings of ``_ratings`` were made by 30
TEMPORAL = RECIPE.model_copy(update={"protocol": "temporal", "temporal_quantile": 0.5})


def test_temporal_windows_on_the_right_side_have_no_problem() -> None:
    late = _windows().iloc[[1]].assign(window_index=0)
    assert _check(late, recipe=TEMPORAL) == ""
    explicit = TEMPORAL.model_copy(update={"temporal_time": 20})
    assert _check(_windows(), recipe=explicit) == ""


def test_a_test_cutoff_before_the_global_time_is_found() -> None:
    assert _check(_windows(), recipe=TEMPORAL).splitlines() == [
        "user 1, window 0: cut-off 20 lies before the global time 30"
    ]


def _training(truth: list[int]) -> dict:
    """User 1 trains; the window is cut off at 20 and T is 40."""
    windows = _windows().iloc[[0]].assign(split="train", ground_truth_movie_ids=[truth])
    return {
        "windows": windows,
        "user_splits": pd.DataFrame({"user_id": [1], "split": ["train"]}),
        "recipe": TEMPORAL.model_copy(update={"temporal_time": 40}),
    }


def test_training_ground_truth_after_the_global_time_is_found() -> None:
    assert _check(**_training([1])) == ""
    found = _check(**_training([1, 4]))
    assert "training ground truth was rated after the global time: [4]" in found


def test_a_training_cutoff_after_the_global_time_is_found() -> None:
    given = _training([1]) | {"recipe": TEMPORAL.model_copy(update={"temporal_time": 19})}
    assert "training cut-off 20 lies after the global time 19" in _check(**given)


def test_ids_of_one_film_are_told_apart_without_canonical_ids() -> None:
    assert "ground truth is not the next 2" in _check(_windows(), canonical=None)


def test_an_invalid_cutoff_is_found() -> None:
    strict = RECIPE.model_copy(update={"min_per_class": 2})
    both = strict.model_copy(update={"balance": "both"})
    assert _check(_windows(), recipe=strict) == ""
    assert "cut-off is not valid: 2 liked and 1 disliked" in _check(_windows(), recipe=both)


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("context_movie_ids", [2, 5], "context_movie_ids differ from the window's"),
        ("ground_truth_movie_ids", [4, 1], "ground_truth_movie_ids differ from the window's"),
        ("split", "train", "split differs"),
        ("cutoff_timestamp", 19, "cutoff_timestamp differs"),
        ("prompt", "Liked: Heat (1995)", "the prompt names ground truth 'Heat (1995)'"),
        ("prompt", "Body Heat (1981), Heat (1995)", "names ground truth 'Heat (1995)'"),
        ("prompt", "Liked: unknown", "the prompt names ground truth 'unknown'"),
        ("window_index", 7, "user 1, window 7: has a prompt and no window"),
        ("window_index", 7, "user 1, window 0: has a window and no prompt"),
        ("window_index", 1, "1 windows have more than one prompt"),
    ],
)
def test_a_planted_prompt_leak_is_found(column, value, problem) -> None:
    prompts = _with(_prompts(), column, value)
    assert problem in "\n".join(prompt_problems(prompts, _windows(), _movies()))


def test_a_title_inside_a_longer_context_title_is_no_leak() -> None:
    movies = _movies().replace({"title": {"Body Heat (1981)": "Body Heat (1995)"}})
    prompts = _with(_prompts(), "prompt", "Liked: Body Heat (1995)")
    assert prompt_problems(prompts, _windows(), movies) == []
    prompts = _with(_prompts(), "prompt", "Liked: Body Heat (1995); Heat (1995)")
    assert len(prompt_problems(prompts, _windows(), movies)) == 1
