"""The constants of the `sample` generator, each named once.

What belongs here: archetypes of taste, `SampleConfig` and its values. What does not: the model
that uses them, which `sample` explains. The values were set by what rating data is generally
like (shares of stars, ties, popularity), never by what a model scores on the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from llmrec_assets.ground.sample_films import GENRES

_US_ZIPS = """
02139 01003 06511 03755 05401 04101 02906 10025 11215 12203 14850 14627 07030 08540 19104 15213
16801 19711 21218 20740 20009 22903 22201 23220 25301 27514 27701 28205 29205 30307 30602 32601
33133 32801 35203 36830 37212 37996 38104 39201 40202 40506 43210 44106 45220 46202 47405 46556
48104 48824 49503 53703 53211 55414 55105 56301 50011 52240 57069 58102 59801 60614 60201 61801
62901 63130 64110 65201 66044 67208 68508 70118 70803 72701 73019 74104 75206 76201 77005 78704
78212 79409 80302 80203 82070 83702 84102 84604 85281 85719 87106 89102 89503 90024 90291 91106
92103 92697 93106 94110 94704 94301 95064 95616 96822 97202 97401 98103 98225 99163 99501
"""


@dataclass(frozen=True)
class Archetype:
    """A kind of film-goer, and the people among whom it is somewhat likelier."""

    likes: str
    dislikes: str
    ages: tuple[int, int]
    gender: str
    occupations: str

    def taste(self) -> NDArray[np.float64]:
        """Vector over `GENRES`: +1 liked, -1 disliked, 0 indifferent."""
        liked, disliked = self.likes.split(), self.dislikes.split()
        return np.array([float(g in liked) - float(g in disliked) for g in GENRES])


_ARCHETYPES = (
    Archetype(
        "Action Adventure Sci-Fi Thriller", "Romance Musical", (10, 34), "M",
        "engineer programmer technician student scientist",
    ),
    Archetype(
        "Drama Film-Noir Mystery Documentary", "Action Children's", (30, 80), "",
        "artist educator librarian writer lawyer",
    ),
    Archetype(
        "Animation Children's Comedy Fantasy Musical", "Horror War Crime", (25, 49), "F",
        "homemaker healthcare educator administrator",
    ),
    Archetype(
        "Horror Crime Thriller Mystery", "Children's Musical", (16, 39), "M",
        "student entertainment none salesman",
    ),
    Archetype(
        "Romance Comedy Drama Musical", "Horror War Sci-Fi", (18, 60), "F",
        "marketing administrator healthcare other",
    ),
    Archetype(
        "War Western Film-Noir Drama", "Animation Horror Fantasy", (45, 80), "M",
        "retired executive doctor lawyer",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class SampleConfig:
    """Every constant of the generator, chosen for what rating data is generally like."""

    n_users: int = 500
    archetypes: tuple[Archetype, ...] = _ARCHETYPES
    #: Factor on an archetype's odds for each of age, gender and occupation that matches.
    demographic_pull: float = 1.7
    #: Share of the first archetype in a taste, drawn evenly; the second has the rest.
    first_taste_share: tuple[float, float] = (0.55, 0.95)
    taste_noise: float = 0.3

    male_share: float = 0.62
    age_mean: float = 34.0
    age_spread: float = 12.0
    age_range: tuple[int, int] = (10, 73)
    student_until: int = 22
    retired_from: int = 63
    #: Chance that someone so young is a student, or so old is retired.
    age_sets_occupation: float = 0.75
    #: u.occupation's order, with rough weights among other ages.
    occupations: tuple[tuple[str, int], ...] = (
        ("administrator", 8), ("artist", 3), ("doctor", 1), ("educator", 10), ("engineer", 8),
        ("entertainment", 2), ("executive", 4), ("healthcare", 2), ("homemaker", 2),
        ("lawyer", 2), ("librarian", 5), ("marketing", 3), ("none", 1), ("other", 11),
        ("programmer", 8), ("retired", 1), ("salesman", 2), ("scientist", 4), ("student", 12),
        ("technician", 4), ("writer", 5),
    )  # fmt: skip
    us_zips: tuple[str, ...] = tuple(_US_ZIPS.split())
    odd_zips: tuple[str, ...] = ("V5K0A", "M5V2T", "H3Z2Y", "SW1A2", "00000", "99999")
    odd_zip_share: float = 0.03

    #: Ratings of a user: minimum + log-normal (median, spread), cut at the maximum.
    min_ratings: int = 25
    extra_ratings_median: float = 18.0
    extra_ratings_spread: float = 0.85
    max_ratings: int = 120

    #: Popularity falls as 1 / (rank + offset) ** exponent; the offset keeps the head from being
    #: rated by nearly everyone.
    zipf_exponent: float = 1.2
    zipf_offset: float = 10.0
    taste_pull: float = 1.1
    mood_pull: float = 1.2
    release_boost: float = 2.0
    release_fade_days: float = 60.0
    sequel_pull: float = 2.5
    #: Against rating the same title again under its other id: it happens, but rarely.
    twin_reluctance: float = 2.5
    liked_from: int = 4

    rating_mean: float = 3.3
    user_bias_spread: float = 0.3
    quality_spread: float = 0.45
    taste_weight: float = 0.5
    rating_noise: float = 1.1

    first_start: datetime = datetime(2008, 1, 1, tzinfo=UTC)
    start_days: int = 1000
    session_size: tuple[int, int] = (4, 20)
    session_gap_days: tuple[int, int] = (1, 30)
    same_second_chance: float = 0.42
    max_pause_seconds: int = 90


DEFAULTS = SampleConfig()
