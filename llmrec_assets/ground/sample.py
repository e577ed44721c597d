"""The `sample` dataset: a small rating history anyone may have, in ML-100K's own file format.

What belongs here: the seeded generator of invented people and their ratings, and the writing of
the five files. What does not: reading such files (the MovieLens reader, which must not know that
these are invented), the films, which are facts (`sample_films`), nor the constants of the model
(`sample_config.SampleConfig` names every one).

The model:

- **Taste.** A user mixes two archetypes (a vector over genres: likes +1, dislikes -1) and adds
  individual noise. Matching age, gender or occupation only makes an archetype likelier.
- **Choice.** The next film is drawn with log weight = Zipf popularity + taste match + the
  session's genre mood + a boost that fades after release + a pull towards the sequel of a liked
  film. A film is never drawn before its release, nor twice by one user.
- **Rating.** round(mean + user bias + film quality + taste match + noise), clipped to 1 … 5.
- **Time.** Users start over about three years and rate in sessions of a few minutes, days
  apart; as in ML-100K, many ratings fall into the same second.

All randomness comes from ``Generator.random`` in a fixed order: numpy may change the streams of
its other distributions between releases (NEP 19), and the committed files must stay reproducible.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmrec_assets.ground.sample_config import DEFAULTS, SampleConfig
from llmrec_assets.ground.sample_films import GENRES, Film, films

Floats = NDArray[np.float64]
_DAY = 86_400


@dataclass(frozen=True)
class SampleFiles:
    """The five files as bytes, ready to write."""

    data: bytes
    item: bytes
    user: bytes
    genre: bytes
    occupation: bytes


@dataclass(frozen=True)
class _User:
    age: int
    gender: str
    occupation: str
    zip_code: str


class _Dice:
    """The few distributions the generator needs, from ``Generator.random`` alone."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.Generator(np.random.PCG64(seed))

    def evenly(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(self._rng.random())

    def whole(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return low + int(self._rng.random() * (high - low + 1))

    def bell(self, size: int = 1) -> Floats:
        """Near-normal, mean 0 and variance 1: twelve uniforms less six, exact additions only."""
        return np.asarray(self._rng.random((size, 12)).sum(axis=1) - 6.0)

    def order(self, size: int) -> NDArray[np.int64]:
        """A random permutation of 0 … size - 1."""
        return np.argsort(self._rng.random(size), kind="stable")

    def pick(self, weights: Floats) -> int:
        """An index, with chance proportional to its weight."""
        edges = np.cumsum(weights)
        return int(np.searchsorted(edges, self._rng.random() * edges[-1], side="right"))


class _Catalogue:
    """The films as arrays, with this seed's popularity and quality."""

    def __init__(self, catalogue: list[Film], dice: _Dice, config: SampleConfig) -> None:
        titles = [film.title for film in catalogue]
        # One title under two ids is one film: same quality, its audience split between the ids.
        first = np.array([titles.index(title) for title in titles])
        copies = np.array([titles.count(title) for title in titles])
        rank = 1.0 + dice.order(len(titles)) + config.zipf_offset
        self.log_popularity = -config.zipf_exponent * np.log(rank[first]) - np.log(copies)
        self.quality = config.quality_spread * dice.bell(len(titles))[first]
        self.twins = first[:, None] == first[None, :]
        flags = np.array([[float(g in film.genres) for g in GENRES] for film in catalogue])
        self.flags = flags / np.sqrt(flags.sum(axis=1, keepdims=True))
        self.release = np.array([film.release_time for film in catalogue])
        self.sequel: dict[int, int] = {}
        latest: dict[str, int] = {}
        for index in np.argsort(self.release, kind="stable").tolist():
            franchise = catalogue[index].franchise
            if franchise and franchise in latest:
                self.sequel[latest[franchise]] = index
            if franchise:
                latest[franchise] = index


def _person(dice: _Dice, config: SampleConfig) -> _User:
    low, high = config.age_range
    drawn = config.age_mean + config.age_spread * float(dice.bell()[0])
    age = min(max(int(drawn), low), high)
    gender = "M" if dice.evenly() < config.male_share else "F"
    weights = np.array([float(weight) for _, weight in config.occupations])
    occupation = config.occupations[dice.pick(weights)][0]
    if dice.evenly() < config.age_sets_occupation:
        if age <= config.student_until:
            occupation = "student"
        elif age >= config.retired_from:
            occupation = "retired"
    zips = config.odd_zips if dice.evenly() < config.odd_zip_share else config.us_zips
    return _User(age, gender, occupation, zips[dice.whole(0, len(zips) - 1)])


def _taste(user: _User, dice: _Dice, config: SampleConfig) -> Floats:
    matches = [
        (kind.ages[0] <= user.age <= kind.ages[1])
        + (kind.gender == user.gender)
        + (user.occupation in kind.occupations.split())
        for kind in config.archetypes
    ]
    odds = np.array([config.demographic_pull**count for count in matches])
    first, second = config.archetypes[dice.pick(odds)], config.archetypes[dice.pick(odds)]
    share = dice.evenly(*config.first_taste_share)
    noise = config.taste_noise * dice.bell(len(GENRES))
    return share * first.taste() + (1.0 - share) * second.taste() + noise


def _history(
    taste: Floats, catalogue: _Catalogue, dice: _Dice, config: SampleConfig
) -> list[tuple[int, int, int]]:
    """One user's (film index, rating, timestamp), in the order rated."""
    extra = config.extra_ratings_median * np.exp(config.extra_ratings_spread * dice.bell()[0])
    n_ratings = min(config.min_ratings + int(extra), config.max_ratings)
    bias = config.user_bias_spread * float(dice.bell()[0])
    match = catalogue.flags @ taste
    expected = config.rating_mean + bias + catalogue.quality + config.taste_weight * match
    appeal = catalogue.log_popularity + config.taste_pull * match
    unseen = np.ones(len(match))
    time = int(config.first_start.timestamp()) + dice.whole(0, config.start_days * _DAY)
    history: list[tuple[int, int, int]] = []
    while len(history) < n_ratings:
        # A mood is one of the genres this user tends to like.
        mood = catalogue.flags[:, 1 + dice.pick(np.exp(taste[1:]))]
        age_days = (time - catalogue.release) / _DAY
        fresh = np.exp(-np.maximum(age_days, 0.0) / config.release_fade_days)
        released = np.where(age_days >= 0, 1.0, 0.0)
        session = config.mood_pull * mood + config.release_boost * fresh
        for _ in range(min(dice.whole(*config.session_size), n_ratings - len(history))):
            film = dice.pick(np.exp(appeal + session) * released * unseen)
            score = expected[film] + config.rating_noise * dice.bell()[0]
            rating = int(min(max(np.floor(score + 0.5), 1), 5))
            history.append((film, rating, time))
            unseen[film] = 0.0
            appeal[catalogue.twins[film]] -= config.twin_reluctance
            if rating >= config.liked_from and film in catalogue.sequel:
                appeal[catalogue.sequel[film]] += config.sequel_pull
            if dice.evenly() >= config.same_second_chance:
                time += dice.whole(1, config.max_pause_seconds)
        time += _DAY * dice.whole(*config.session_gap_days) + dice.whole(0, _DAY // 4)
    return history


def _lines(rows: list[str]) -> bytes:
    return "".join(f"{row}\n" for row in rows).encode("latin-1")


def generate(seed: int = 1, config: SampleConfig = DEFAULTS) -> SampleFiles:
    """Invents `config.n_users` people and their ratings of the committed films.

    The same seed and config give the same bytes. ``u.data`` is sorted by user, timestamp and
    movie id; ``u.item``, ``u.genre`` and ``u.occupation`` do not depend on the seed.
    """
    catalogue = films()
    dice = _Dice(seed)
    arrays = _Catalogue(catalogue, dice, config)
    users: list[str] = []
    ratings: list[tuple[int, int, int, int]] = []
    for user_id in range(1, config.n_users + 1):
        user = _person(dice, config)
        users.append(f"{user_id}|{user.age}|{user.gender}|{user.occupation}|{user.zip_code}")
        history = _history(_taste(user, dice, config), arrays, dice, config)
        ratings += [(user_id, time, film + 1, rating) for film, rating, time in history]
    items = [
        "|".join(
            [str(movie_id), film.title, film.released, "", ""]
            + [str(int(genre in film.genres)) for genre in GENRES]
        )
        for movie_id, film in enumerate(catalogue, start=1)
    ]
    return SampleFiles(
        data=_lines(
            [f"{user}\t{film}\t{rating}\t{t}" for user, t, film, rating in sorted(ratings)]
        ),
        item=_lines(items),
        user=_lines(users),
        genre=_lines([f"{genre}|{index}" for index, genre in enumerate(GENRES)]),
        occupation=_lines([name for name, _ in config.occupations]),
    )


def write_sample(directory: Path, seed: int = 1) -> None:
    """Writes u.data, u.item, u.user, u.genre and u.occupation into `directory`, creating it.

    Each file is written aside and renamed, so that a reader never meets half a file.
    """
    files = generate(seed)
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("data", "item", "user", "genre", "occupation"):
        aside = directory / f".u.{name}.partial"
        aside.write_bytes(getattr(files, name))
        os.replace(aside, directory / f"u.{name}")
