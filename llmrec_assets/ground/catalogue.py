"""The catalogue a model is shown: the real titles, or invented ones in their place.

What belongs here: which title stands for which film everywhere a model reads or writes one, and
the checks that no real title shows through. What does not: reading the real films (``movielens``),
comparing spellings (``titles``), finding the film a text means (``grounding``).

The anonymised control: a model that recommends from what it has read about films loses it with
the titles; one that has learnt from training users who likes what keeps it. Years and genres
stay, so what they tell stays too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.recipes import PromptRecipe
from llmrec_assets.ground.titles import article_first, fold, normalise_title, split_year
from llmrec_assets.ground.titles import title_variants as variants

_ADJECTIVES = """
    amber ashen autumn bitter borrowed brittle copper crimson crooked distant drifting dusty
    fading feathered frozen gentle gilded hollow hushed ivory jagged leaden lonesome marbled
    mellow misty mossy muted narrow northern opal painted pale patient quiet ragged restless
    rusted saffron salted scarlet shuttered silver slanted sleepless slender southern sunken
    tangled tattered thirsty threadbare timid twilit unmarked velvet wandering weary whistling
    wooden woven
"""
_NOUNS = """
    almanac anchor anvil aqueduct archway balcony ballad banister barley basin beacon bellows
    bramble brook candle canopy carriage causeway cellar chimney cinder clover cobbler compass
    coppice courier cradle crossing cupboard dial doorway drawbridge embankment ember errand
    estuary fiddle flagstone flint footpath foundry furrow gallery gatehouse glade granary
    gravel hammock harness hatbox hedgerow hinge jetty keel kettle kiln ladder lantern larder
    lattice ledger lighthouse lockkeeper loom mallet meadow millstone mooring mosaic orchard
    oriel paddle parcel parlour pavilion pennant pergola plough quay quill rafter ravine
    reservoir rudder saddle sawmill scaffold shingle sluice spindle stairwell stepladder
    tannery thicket thimble timetable tollhouse towpath trellis turnstile undertow vestibule
    viaduct wagon watermill weathervane windowsill workbench
"""
_PLACES = """
    Aldermere Brackwell Calloway Dunmarrow Eskerby Fennimore Garrowby Halvard Ildenham Jessamy
    Kestering Lowmarsh Marrowgate Norwyck Orrinby Pellworth Quenby Ravelstone Saltmarsh
    Tarrowdale Ulverby Vennacher Wexholm Yarrowfield
"""
#: None can end in the whole of another: "Keel and Quay (1990)" must not stand in a longer title.
_PATTERNS = (
    "{adjective} {noun}",
    "{noun} of {place}",
    "{adjective} {noun} in {place}",
    "{noun} and {other}",
)
_MOST_ATTEMPTS = 1_000

_Words = tuple[str, ...]


def shown_catalogue(movies: pd.DataFrame, recipe: PromptRecipe, seed: int) -> pd.DataFrame:
    """The films as every prompt, completion, grounding and list names them.

    Args:
        movies: ``MOVIES``.
        recipe: ``titles: real`` keeps the titles; ``invented`` replaces them one to one.
        seed: seed of the inventions; real titles do not read it.

    Returns:
        Columns of ``CATALOGUE``, in the order of ``movies``; only titles may differ.
    """
    if recipe.titles == "real":
        return movies
    titles = invented_titles(movies, seed)
    return movies.assign(title=pd.Series(titles, index=movies.index, dtype="str"))


def invented_titles(movies: pd.DataFrame, seed: int) -> list[str]:
    """One invented title per row of ``MOVIES``, with the row's year.

    A title is a seeded stable hash of the film's canonical id put into words; the real title is
    read only to keep clear of it. So nothing of it can be derived, and a new film renames no old
    one (but where both would have got the same words). Names are distinct even without their
    year, and none contains a real name of the catalogue as a run of words. Titles under two ids
    stay one title.

    Raises:
        DataError: the catalogue has more films than names can be invented for.
    """
    real = RealNames(movies["title"])
    taken: set[str] = set()
    name_of: dict[int, str] = {}
    for film in sorted(set(movies["canonical_movie_id"].tolist())):
        for attempt in range(_MOST_ATTEMPTS):
            name = _name(seed, film, attempt)
            key = normalise_title(name)
            repeats = len(set(name.split())) < len(name.split())  # "Quay and Quay"
            if key not in taken and not repeats and not real.within(name):
                break
        else:
            raise DataError(
                f"catalogue: no name is left to invent for film {film} ({len(taken):,} are taken); "
                "use titles: real, or add words to ground/catalogue.py"
            )
        taken.add(key)
        name_of[film] = name
    return [
        name_of[film] if pd.isna(year) else f"{name_of[film]} ({int(year)})"
        for film, year in zip(movies["canonical_movie_id"].tolist(), movies["year"], strict=True)
    ]


def _name(seed: int, film: int, attempt: int) -> str:
    digest = hashlib.blake2b(f"title:{seed}:{film}:{attempt}".encode(), digest_size=16).digest()
    number = int.from_bytes(digest, "big")
    drawn: list[str] = []
    word_lists = (_ADJECTIVES, _NOUNS, _NOUNS, _PLACES)
    for words in (_PATTERNS, *map(str.split, word_lists)):
        number, index = divmod(number, len(words))
        drawn.append(words[index])
    pattern, adjective, noun, other, place = drawn
    name = pattern.format(adjective=adjective, noun=noun, other=other, place=place)
    small = {"of", "in", "and"}
    return " ".join(word if word in small else word.capitalize() for word in name.split())


class RealNames:
    """Finds real titles in a text by runs of folded words, each title in every spelling
    ``titles`` knows: as it stands, article moved or dropped, an alternative title alone."""

    def __init__(self, titles: Iterable[str]) -> None:
        self._names: dict[str, list[tuple[_Words, str, int | None]]] = {}
        for title in dict.fromkeys(titles):
            _, year = split_year(title)
            for words in dict.fromkeys(_spellings(title)):
                self._names.setdefault(words[0], []).append((words, title, year))

    def within(self, name: str) -> list[str]:
        """Real titles whose name, without its year, is a run of words of ``name``."""
        return [title for _, title, _, _ in self._runs(_words(name))]

    def shown(self, text: str) -> list[str]:
        """Real titles that ``text`` shows: a name of two words or more, or any name followed by
        its own year. One word without its year may be a word of the request, a genre or a place
        ("unknown", "war", "Philadelphia")."""
        words = _words(text)
        found = [
            title
            for run, title, year, end in self._runs(words)
            if len(run) > 1 or (year is not None and words[end : end + 1] == (str(year),))
        ]
        return list(dict.fromkeys(found))

    def _runs(self, words: _Words) -> Iterator[tuple[_Words, str, int | None, int]]:
        for start, word in enumerate(words):
            for run, title, year in self._names.get(word, ()):
                end = start + len(run)
                if words[start:end] == run:
                    yield run, title, year, end


def _spellings(title: str) -> Iterator[_Words]:
    for variant in variants(title):
        for spelling in (variant, article_first(variant), normalise_title(variant)):
            if words := _words(spelling):
                yield words


def _words(text: str) -> _Words:
    return tuple(fold(text).split())


def catalogue_problems(
    catalogue: pd.DataFrame, movies: pd.DataFrame, recipe: PromptRecipe
) -> list[str]:
    """Everything in ``CATALOGUE`` that is not the same films under the titles the recipe asks for.

    Returns:
        One sentence per problem; with ``titles: invented`` also every invention that repeats
        another film's name, changes the year, or contains a real name.
    """
    columns = ["movie_id", "canonical_movie_id"]
    if not catalogue[columns].reset_index(drop=True).equals(movies[columns].reset_index(drop=True)):
        return ["the films are not those of movies, in their order"]
    pairs = list(zip(movies["movie_id"], movies["title"], catalogue["title"], strict=True))
    if recipe.titles == "real":
        return [
            f"movie {movie_id}: {shown!r} is not the real title"
            for movie_id, title, shown in pairs
            if shown != title
        ]
    real_names, films_of = RealNames(movies["title"]), dict[str, set[int]]()
    problems = []
    for (movie_id, _, shown), film, year in zip(
        pairs, movies["canonical_movie_id"], movies["year"], strict=True
    ):
        name, shown_year = split_year(shown)
        films_of.setdefault(normalise_title(name), set()).add(film)
        if shown_year != (None if pd.isna(year) else int(year)):
            problems.append(f"movie {movie_id}: {shown!r} has another year than the film")
        if real_names.within(name):
            problems.append(f"movie {movie_id}: {shown!r} contains a real title")
    problems += [
        f"movies {sorted(films)} share the name {name!r}"
        for name, films in films_of.items()
        if len(films) > 1
    ]
    return problems


def real_title_problems(
    prompts: pd.DataFrame, movies: pd.DataFrame, users: pd.DataFrame, recipe: PromptRecipe
) -> list[str]:
    """Real titles in the prompts or completions of an anonymised recipe; with real titles none is
    a problem.

    A user's own city and state are left out of the search: "Paris, Texas" may be an address.

    Args:
        prompts: ``PROMPTS``.
        movies: ``MOVIES``, with the real titles.
        users: ``USERS``.

    Returns:
        One sentence per title and text, naming user and window.
    """
    if recipe.titles == "real":
        return []
    real = RealNames(movies["title"])
    place_of = _places(users.to_dict("records"))
    problems = []
    for row in prompts.to_dict("records"):
        asked = str(row["prompt"])
        if place := place_of.get(row["user_id"]):
            asked = asked.replace(place, " | ", 1)
        for what, text in (("prompt", asked), ("completion", str(row["completion"]))):
            problems += [
                f"user {row['user_id']}, window {row['window_index']}: the {what} shows the real "
                f"title {title!r}"
                for title in real.shown(text)
            ]
    return problems


def _places(users: Sequence[Mapping[Any, Any]]) -> dict[int, str]:
    """ "from City, State" as a prompt says it, by user id."""
    said = {
        user["user_id"]: ", ".join(
            str(user[name])
            for name in ("city", "state")
            if not pd.isna(user.get(name)) and str(user[name]).strip()
        )
        for user in users
    }
    return {user_id: f"from {place}" for user_id, place in said.items() if place}
