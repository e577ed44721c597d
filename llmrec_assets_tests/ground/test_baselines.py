import pandas as pd
import pyarrow as pa

from llmrec_assets.ground.baselines import Popularity, popularity_ranking
from llmrec_assets.ground.evaluation import user_metrics
from llmrec_assets.ground.fits import training_events
from llmrec_assets.ground.recommender import Window, recommended_frame
from llmrec_assets.ground.schemas import RECOMMENDATIONS

#: film 14 is film 4 under a second id
MOVIES = pd.DataFrame(
    {
        "movie_id": [1, 2, 3, 4, 5, 14],
        "title": ["One", "Two", "Three", "Four", "Five", "Four"],
        "canonical_movie_id": [1, 2, 3, 4, 5, 4],
    }
)
SPLITS = pd.DataFrame({"user_id": [1, 2, 3, 4, 9], "split": ["train"] * 3 + ["validation", "test"]})
RATINGS = pd.DataFrame(
    [
        (1, 4, 5, 1), (2, 14, 3, 1), (3, 4, 4, 1), (3, 14, 5, 2),  # film 4: three users
        (1, 3, 5, 1), (2, 3, 3, 1),  # film 3: two
        (1, 2, 4, 1), (2, 2, 2, 1),  # film 2: one, and one who disliked it
        (3, 5, 4, 1),  # film 5: one
        (4, 1, 5, 1), (9, 1, 5, 1),  # film 1: no training user
        (9, 14, 5, 2), (9, 2, 5, 9),
    ],
    columns=["user_id", "movie_id", "rating", "timestamp"],
)  # fmt: skip
PROMPTS = pd.DataFrame(
    {
        "user_id": [9],
        "window_index": [0],
        "split": ["test"],
        "context_movie_ids": [[14]],
        "ground_truth_movie_ids": [[2]],
    }
)
SEEN = {(9, 0): frozenset({1, 4})}
TITLE_OF = dict(zip(MOVIES["movie_id"], MOVIES["title"], strict=True))


def _ranking(ratings: pd.DataFrame, splits: pd.DataFrame, liked_min: int) -> list[int]:
    return popularity_ranking(training_events(ratings, splits, MOVIES), MOVIES, liked_min)


def _recommended(hidden: set[int], top_k: int) -> pd.DataFrame:
    windows = [Window(9, 0, 2, (4,), (True,), frozenset(hidden))]
    return recommended_frame(
        windows,
        Popularity(_ranking(RATINGS, SPLITS, 3)).recommend(windows, top_k),
        SEEN,
        TITLE_OF,
        stage="popularity",
        decoding="ranking",
        information_set="history",
        top_k=top_k,
        prompts_version="p1",
    )


def test_ranking_counts_training_users_once_per_film() -> None:
    assert _ranking(RATINGS, SPLITS, 3) == [4, 3, 2, 5, 1]
    assert _ranking(RATINGS, SPLITS, 5) == [4, 3, 1, 2, 5]


def test_recommendations_by_hand() -> None:
    history = _recommended({1, 4}, 4)
    pa.Table.from_pandas(history, schema=RECOMMENDATIONS, preserve_index=False).validate(full=True)
    assert history["movie_id"].tolist()[:3] == [3, 2, 5]
    assert history["grounding"].tolist() == ["id", "id", "id", "missing"]  # catalogue exhausted
    assert history["text"].tolist()[:3] == ["Three", "Two", "Five"]
    assert not history["is_seen"].any()
    # the prompt shows film 4 only: film 1 is offered although seen, and marked
    prompt = _recommended({4}, 4)
    assert prompt["movie_id"].tolist() == [3, 2, 5, 1]
    assert prompt["is_seen"].tolist() == [False, False, False, True]
    assert not prompt["is_duplicate"].any()


def test_scored_like_any_other_recommender() -> None:
    scores = user_metrics(_recommended({4}, 2).assign(recommendations_version="r"), PROMPTS, MOVIES)
    assert scores["hits"].tolist() == [1]


def test_order_of_ratings_does_not_matter() -> None:
    assert _ranking(RATINGS.iloc[::-1], SPLITS.iloc[::-1], 3) == _ranking(RATINGS, SPLITS, 3)
