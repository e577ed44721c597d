"""Reading, windows and prompts of a data set of ML-1M's format and size.

Peers: a loop over users as in notebooks (``read_csv`` with its "::" separator, ``groupby``, one
small frame a user), and pandas on whole columns. Both give the very same table; neither checks its
input, as ours does (fields, whole numbers, known ids, repeated pairs, encodings).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from bench.frame import Bench, Comparison, Peer, Row, Timer
from bench.ratings import ml_1m_sized
from llmrec_assets.ground import movielens
from llmrec_assets.ground.prompts import render_prompts
from llmrec_assets.ground.recipes import load_recipe
from llmrec_assets.ground.schemas import PROMPTS
from llmrec_assets.ground.splits import split_users
from llmrec_assets.ground.tables import conform, content_version
from llmrec_assets.ground.windows import interaction_windows

SEED = 1
RECIPE = load_recipe("paper")
FULL, USERS = 1_000_209, 6_040

_NAMES = ["user_id", "movie_id", "rating", "timestamp"]
_US_ZIP = re.compile(r"([0-9]{5})(?:-?[0-9]{4})?")


def rows(bench: Bench) -> list[Row]:
    comparison = Comparison(
        stage="windows",
        title="reading + windows + prompts, ML-1M format, 1,000,209 rows",
        prepare=prepare,
        small=FULL // 10,
        full=FULL,
        ours="ours",
        peers=[
            Peer("per-user pandas loop", "loop", goal=50, repeats=2),
            Peer("vectorised pandas", "vectorised", goal=3, repeats=3),
        ],
        check=check,
        floor=floor,
    )
    return [comparison.row(bench)]


def prepare(directory: Path, size: int) -> str:
    return ml_1m_sized(directory, size, USERS * size // FULL, SEED)


def ours(inputs: Path, out: Path, timer: Timer) -> None:
    with timer():
        users = movielens.read_users(inputs, "ml-1m")
        movies = movielens.read_movies(inputs, "ml-1m")
        ratings = movielens.read_ratings(inputs, "ml-1m", users, movies)
        splits = split_users(users["user_id"], RECIPE.splits, SEED)
        windows = interaction_windows(
            ratings,
            splits,
            RECIPE.windows,
            SEED,
            canonical=movies[["movie_id", "canonical_movie_id"]],
        )
        prompts = render_prompts(windows, users, movies, RECIPE.prompts, RECIPE.windows)
    _keep(prompts, out)


def loop(inputs: Path, out: Path, timer: Timer) -> None:
    """One small frame a user."""
    from pyzipcode import ZipCodeDatabase

    with timer():
        ratings = pd.read_csv(
            inputs / "ratings.dat", sep="::", engine="python", header=None, names=_NAMES
        )
        users, movies = _read_users(inputs), _read_movies(inputs)
        canonical = dict(zip(movies["movie_id"], movies["canonical"], strict=True))
        title_of = dict(zip(movies["movie_id"], movies["title"], strict=True))
        genres_of = dict(zip(movies["movie_id"], movies["genres"], strict=True))
        profiles = users.set_index("user_id").to_dict("index")
        places = ZipCodeDatabase()
        rule, made = RECIPE.windows, []
        for user_id, rated in ratings.groupby("user_id"):
            rated = rated.sort_values(["timestamp", "movie_id", "rating"])
            liked = rated["rating"] >= rule.liked_min
            film = rated["movie_id"].map(canonical)
            candidate = liked & ~film.duplicated()
            n_liked, n_candidates = liked.cumsum(), candidate.cumsum()
            n_disliked = (~liked).cumsum()
            ends = rated["timestamp"] != rated["timestamp"].shift(-1)
            enough = (n_liked >= rule.min_per_class) | (n_disliked >= rule.min_per_class)
            follow = candidate.sum() - n_candidates >= rule.min_ground_truth
            cutoffs = rated.loc[ends & enough & follow, "timestamp"]
            profile = profiles[user_id]
            found = _US_ZIP.fullmatch(profile["zip_code"])
            place = places.get(found.group(1)) if found else None
            split = _split_of(user_id)
            most = getattr(rule.windows_per_user, split)
            drawn = sorted(cutoffs, key=lambda cutoff: (_draw(user_id, cutoff), cutoff))[:most]
            for index, cutoff in enumerate(sorted(drawn)):
                context = rated[rated["timestamp"] <= cutoff].tail(rule.window_size)
                after = rated[candidate & (rated["timestamp"] > cutoff)].head(rule.top_k)
                made.append(
                    _row(
                        user_id,
                        index,
                        split,
                        cutoff,
                        context["movie_id"].tolist(),
                        context["rating"].tolist(),
                        after["movie_id"].tolist(),
                        profile,
                        (place.city, place.state) if place else None,
                        title_of,
                        genres_of,
                    )
                )
    _keep(pd.DataFrame(made), out)


def vectorised(inputs: Path, out: Path, timer: Timer) -> None:
    """Whole columns; a single-character separator, so that pandas' C parser reads the ratings."""
    from llmrec_assets.ground.places import city_state  # many ZIP codes in one query

    with timer():
        ratings = pd.read_csv(
            inputs / "ratings.dat", sep=":", header=None, usecols=[0, 2, 4, 6], dtype="int64"
        ).set_axis(_NAMES, axis=1)
        users, movies = _read_users(inputs), _read_movies(inputs)
        rule = RECIPE.windows
        rated = ratings.sort_values(["user_id", "timestamp", "movie_id", "rating"])
        rated = rated.reset_index(drop=True)
        film = rated["movie_id"].map(movies.set_index("movie_id")["canonical"])
        user, liked = rated["user_id"], rated["rating"] >= rule.liked_min
        candidate = liked & ~pd.DataFrame({"user": user, "film": film}).duplicated()
        by_user = candidate.groupby(user)
        n_candidates, all_candidates = by_user.cumsum(), by_user.transform("sum")
        position = by_user.cumcount() + 1
        n_liked = liked.groupby(user).cumsum()
        ends = (user != user.shift(-1)) | (rated["timestamp"] != rated["timestamp"].shift(-1))
        enough = (n_liked >= rule.min_per_class) | (position - n_liked >= rule.min_per_class)
        valid = ends & enough & (all_candidates - n_candidates >= rule.min_ground_truth)
        cut = rated.loc[valid, ["user_id", "timestamp"]]
        pairs = zip(cut["user_id"].tolist(), cut["timestamp"].tolist(), strict=True)
        cut["draw"] = [_draw(user_id, cutoff) for user_id, cutoff in pairs]
        split_of = {user_id: _split_of(user_id) for user_id in cut["user_id"].unique().tolist()}
        cut["split"] = cut["user_id"].map(split_of)
        cut["most"] = cut["split"].map(rule.windows_per_user.model_dump())
        cut = cut.sort_values(["user_id", "draw", "timestamp"])
        cut = cut[cut.groupby("user_id").cumcount() < cut["most"]]
        cut = cut.sort_values(["user_id", "timestamp"])
        indices = cut.groupby("user_id").cumcount()
        movie_ids, stars = rated["movie_id"].tolist(), rated["rating"].tolist()
        following = rated.loc[candidate, "movie_id"].tolist()
        # candidates before a row over all users, so that a slice of ``following`` is a user's own
        before = candidate.cumsum()
        place_of = city_state(users["zip_code"])
        profiles = users.set_index("user_id").to_dict("index")
        title_of = dict(zip(movies["movie_id"], movies["title"], strict=True))
        genres_of = dict(zip(movies["movie_id"], movies["genres"], strict=True))
        made = []
        columns = [
            cut["user_id"],
            indices,
            cut["split"],
            cut["timestamp"],
            position[cut.index],
            before[cut.index],
            (all_candidates - n_candidates)[cut.index],
        ]
        for end, user_id, index, split, cutoff, place, n_before, left in zip(
            cut.index.tolist(), *(column.tolist() for column in columns), strict=True
        ):
            start = end + 1 - min(place, rule.window_size)
            profile = profiles[user_id]
            made.append(
                _row(
                    user_id,
                    index,
                    split,
                    cutoff,
                    movie_ids[start : end + 1],
                    stars[start : end + 1],
                    following[n_before : n_before + min(left, rule.top_k)],
                    profile,
                    place_of[profile["zip_code"]],
                    title_of,
                    genres_of,
                )
            )
    _keep(pd.DataFrame(made), out)


def check(inputs: Path, out: Mapping[str, Path]) -> str:
    """One version for the tables of all sides: every prompt, completion and id is the same."""
    found = {name: json.loads((path / "table.json").read_text()) for name, path in out.items()}
    assert len({tuple(table.values()) for table in found.values()}) == 1, found
    (one, *_) = found.values()
    return f"The same {one['rows']:,} prompts from all sides (table version {one['version']})"


def floor(inputs: Path) -> tuple[float, str]:
    """Counting the line ends of the ratings file, read from the page cache."""
    import time

    took = []
    for _ in range(5):
        started = time.perf_counter()
        with (inputs / "ratings.dat").open("rb") as file:
            lines = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
        took.append(time.perf_counter() - started)
    assert lines >= 1
    return min(took), "reading the bytes of ratings.dat from the page cache and counting its lines"


def _keep(prompts: pd.DataFrame, out: Path) -> None:
    table = conform(prompts, PROMPTS, "prompts")
    facts = {"rows": table.num_rows, "version": content_version(table)}
    (out / "table.json").write_text(json.dumps(facts))


# ---------------------------------------------------------------- what both peers write by hand


def _read_users(inputs: Path) -> pd.DataFrame:
    names = ["user_id", "gender", "age", "occupation", "zip_code"]
    return pd.read_csv(
        inputs / "users.dat",
        sep="::",
        engine="python",
        header=None,
        names=names,
        dtype={"zip_code": str},
    )


def _read_movies(inputs: Path) -> pd.DataFrame:
    movies = pd.read_csv(
        inputs / "movies.dat",
        sep="::",
        engine="python",
        header=None,
        names=["movie_id", "title", "genres"],
        encoding="latin-1",
    )
    movies["canonical"] = movies.groupby("title")["movie_id"].transform("min")
    movies["genres"] = movies["genres"].str.replace("|", ", ")
    return movies


def _split_of(user_id: int) -> str:
    digest = hashlib.blake2b(f"{SEED}:{user_id}".encode(), digest_size=8).digest()
    position = (int.from_bytes(digest, "big") >> 11) / 2**53
    shares = RECIPE.splits
    if position < shares.train:
        return "train"
    return "validation" if position < shares.train + shares.validation else "test"


def _draw(user_id: int, cutoff: int) -> str:
    return hashlib.md5(f"{SEED}:{user_id}:{cutoff}".encode()).hexdigest()


def _row(
    user_id: int,
    index: int,
    split: str,
    cutoff: int,
    context: Sequence[int],
    stars: Sequence[int],
    truth: Sequence[int],
    profile: Mapping[str, Any],
    place: tuple[str, str] | None,
    title_of: Mapping[int, str],
    genres_of: Mapping[int, str],
) -> dict[str, Any]:
    band = movielens.AGE_BANDS[profile["age"]]
    if band.endswith("+"):
        band = f"{band[:-1]} years or older"
    elif not band.startswith("under"):
        band = f"{band} years old"
    gender = {"M": "male", "F": "female"}[profile["gender"]]
    about = f"{band}, {gender}, occupation: {movielens.OCCUPATIONS[profile['occupation']]}"
    if place:
        about += f", from {place[0]}, {place[1]}"
    day, k = datetime.fromtimestamp(cutoff, tz=UTC), RECIPE.windows.top_k
    lines = ["You are a movie recommender system.", f"The user: {about}."]
    for word, wanted in (("liked", True), ("disliked", False)):
        films = [
            film
            for film, star in zip(context, stars, strict=True)
            if (star >= RECIPE.windows.liked_min) == wanted
        ]
        if films:
            lines.append(f"Films the user {word}, the most recent last:")
            lines += _listed(films[-RECIPE.prompts.max_per_class :], title_of, genres_of)
    lines.append(
        f"Recommend the {k} films the user would most like to watch next, the best first. "
        f"Recommend only films released up to {day.day} {day:%B} {day.year} and none of the films "
        "listed above."
    )
    lines.append(
        f"Answer only with a JSON list of exactly {k} titles in double quotes, each with its year, "
        'such as ["Title (Year)", "Title (Year)"].'
    )
    return {
        "user_id": user_id,
        "window_index": index,
        "split": split,
        "template": "figure2",
        "cutoff_timestamp": cutoff,
        "prompt": "\n".join(lines),
        "completion": json.dumps([title_of[film] for film in truth], ensure_ascii=False),
        "context_movie_ids": context,
        "ground_truth_movie_ids": truth,
    }


def _listed(
    films: Iterable[int], title_of: Mapping[int, str], genres_of: Mapping[int, str]
) -> list[str]:
    return [f"- {title_of[film]} [{genres_of[film]}]" for film in films]
