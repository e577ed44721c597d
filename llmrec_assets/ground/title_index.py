"""The catalogue as grounding reads it: every spelling of every film, indexed for every rung.

What belongs here: which films a spelling stands for. What does not: the order of the rungs and the
thresholds (``grounding``), taking titles apart (``titles``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import TypeVar

import pandas as pd

from llmrec_assets.ground.titles import (
    article_first,
    fold,
    normalise_title,
    short_names,
    split_year,
    title_variants,
)

#: Digits, or a Roman numeral of at least two letters ("i", "v" and "x" are words too).
_NUMERAL = re.compile(r"\d+|(?=[ivx]{2})x{0,2}(?:ix|iv|v?i{0,3})")
_Key = tuple[str, int | None]
_K = TypeVar("_K", bound=Hashable)
_NOBODY: tuple[int, ...] = ()


@dataclass(frozen=True)
class Forms:
    """Spellings compared by similarity; the lists are parallel."""

    texts: list[str]
    sorted_texts: list[str]
    """The same spellings, their words in alphabetical order."""
    numerals: list[tuple[str, ...]]
    movie_ids: list[int]


class Catalogue:
    """The films a text may mean: canonical ids with their titles.

    Built from the columns ``movie_id``, ``title``, ``canonical_movie_id`` and ``year`` of the
    ``movies`` table. Where a title stands for several films the smallest id counts; an
    alternative or a short name that several films share says nothing.
    """

    def __init__(self, movies: pd.DataFrame) -> None:
        frame = movies.sort_values(["canonical_movie_id", "movie_id"])
        self._absent: int | None = None
        self._titles: dict[int, str] = {}
        exact: dict[str, list[int]] = defaultdict(list)
        primary: dict[_Key, list[int]] = defaultdict(list)
        variant: dict[_Key, list[int]] = defaultdict(list)
        short: dict[_Key, list[int]] = defaultdict(list)
        run_on: dict[_Key, list[int]] = defaultdict(list)
        forms: dict[int | None, list[tuple[str, int]]] = defaultdict(list)
        columns = (frame[name] for name in ("canonical_movie_id", "title", "year"))
        for movie, raw_title, raw_year in zip(*columns, strict=True):
            movie_id, title = int(movie), str(raw_title).strip()
            year = split_year(title)[1] if pd.isna(raw_year) else int(raw_year)
            self._titles.setdefault(movie_id, title)
            exact[title].append(movie_id)
            primary[normalise_title(title), year].append(movie_id)
            variants = title_variants(title)
            for key in map(normalise_title, variants):
                variant[key, year].append(movie_id)
                variant[key, None].append(movie_id)
                run_on[_run_on(key), year].append(movie_id)
                run_on[_run_on(key), None].append(movie_id)
            for key in map(normalise_title, short_names(title)):
                short[key, year].append(movie_id)
            for form in comparison_forms(variants):
                forms[None].append((form, movie_id))
                if year is not None:
                    forms[year].append((f"{form} {year}", movie_id))
        self._exact = _distinct(exact)
        self._primary = _distinct(primary)
        self._variant = _distinct(variant)
        self._short = _distinct(short)
        self._run_on = _distinct(run_on)
        self._forms = {
            year: Forms(
                [form for form, _ in pairs],
                [sort_words(form) for form, _ in pairs],
                [numerals(form) for form, _ in pairs],
                [movie_id for _, movie_id in pairs],
            )
            for year, pairs in forms.items()
        }

    def without(self, movie_id: int) -> Catalogue:
        """The catalogue one film left out, at no cost: grounds as one built without it would.

        Args:
            movie_id: canonical id; a film under two ids is left out under both.
        """
        rest = copy(self)
        rest._absent = movie_id
        return rest

    @property
    def titles(self) -> dict[int, str]:
        """Canonical id → title (that of the smallest id)."""
        return {film: title for film, title in self._titles.items() if film != self._absent}

    def title(self, movie_id: int) -> str:
        """The film's title."""
        return self._titles[movie_id]

    def has(self, movie_id: int) -> bool:
        """Whether the film is in the catalogue."""
        return movie_id in self._titles and movie_id != self._absent

    def exact(self, text: str) -> int | None:
        """The film whose title is this text, letter by letter."""
        return _first(self._present(self._exact.get(text, _NOBODY)))

    def named(self, key: str, year: int | None) -> int | None:
        """The film of a normalised name (``normalise_title``).

        With a year: the film of that title and year; else the only one with that alternative
        name; else the only one of that short name; else the only one spelled so without its
        blanks and "and"s ("MASH" is "M*A*S*H"). Without: the only film with the name, whatever
        its year; no short names then, since "Dracula" is not "Dracula: Dead and Loving It".
        """
        titled = self._present(self._primary.get((key, year), _NOBODY))
        if year is not None and titled:
            return titled[0]
        found = self._present(self._variant.get((key, year), _NOBODY))
        if not found and year is not None:
            found = self._present(self._short.get((key, year), _NOBODY))
        return _only(found or self._present(self._run_on.get((_run_on(key), year), _NOBODY)))

    def forms(self, year: int | None) -> Forms | None:
        """What to compare a text of this year with; ``None``: of all films, without their years.

        A film left out by ``without`` is still among them: ask ``has``.
        """
        return self._forms.get(year)

    def _present(self, movie_ids: tuple[int, ...]) -> tuple[int, ...]:
        if self._absent is None or self._absent not in movie_ids:
            return movie_ids
        return tuple(movie_id for movie_id in movie_ids if movie_id != self._absent)


def comparison_forms(names: Iterable[str]) -> list[str]:
    """Spellings compared by similarity: article dropped, in front and where it stood."""
    forms: dict[str, None] = {}
    for name in names:
        forms[normalise_title(name)] = None
        forms[fold(article_first(name))] = None
        forms[fold(name)] = None
    return [form for form in forms if form]


def sort_words(form: str) -> str:
    """The words in alphabetical order."""
    return " ".join(sorted(form.split()))


def numerals(form: str) -> tuple[str, ...]:
    """The numbers among the words, Roman ones too, in alphabetical order."""
    return tuple(sorted(word for word in form.split() if _NUMERAL.fullmatch(word)))


def _run_on(key: str) -> str:
    return "".join(word for word in key.split() if word != "and")


def _distinct(found: Mapping[_K, list[int]]) -> dict[_K, tuple[int, ...]]:
    return {key: tuple(sorted(set(movie_ids))) for key, movie_ids in found.items()}


def _first(movie_ids: tuple[int, ...]) -> int | None:
    return movie_ids[0] if movie_ids else None


def _only(movie_ids: tuple[int, ...]) -> int | None:
    return movie_ids[0] if len(movie_ids) == 1 else None
