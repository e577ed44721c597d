"""Grounding: which film of the catalogue an item of a response means, if any.

What belongs here: the ladder exact → normalised → similar → refused, and the published rule it is
compared with. What does not: finding the items in a response (``completions``) and taking titles
apart (``titles``). Seen films and duplicates are judged later, by the recommendations.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
from rapidfuzz import fuzz, process

from llmrec_assets.ground.recipes import GroundingRecipe
from llmrec_assets.ground.titles import (
    article_first,
    fold,
    normalise_title,
    split_year,
    title_variants,
)

Method = Literal["exact", "normalised", "similar", "refused"]

#: WRatio alone takes a fragment for the whole ("s List" scores 90 against "Schindler's List"), so
#: the two texts must also agree over their full length: this many points below the threshold at
#: most, in the given or in sorted word order.
_FULL_LENGTH_ALLOWANCE = 2.0
#: Two different films closer to each other than this: the text does not say which, so refuse.
_MARGIN = 2.0
#: Longer than any title: prose, not worth comparing.
_LONGEST_TEXT = 300
#: Digits, or a Roman numeral of at least two letters ("i", "v" and "x" are words too).
_NUMERAL = re.compile(r"\d+|(?=[ivx]{2})x{0,2}(?:ix|iv|v?i{0,3})")


@dataclass(frozen=True)
class Match:
    """Where a text landed. ``movie_id`` is canonical; None exactly when refused.

    ``similarity`` (0 to 100) is the score a similar match was accepted at, otherwise None.
    """

    movie_id: int | None
    method: Method
    similarity: float | None = None


REFUSED = Match(None, "refused")


class Catalogue:
    """The films a text may mean: canonical ids with their titles, indexed for every rung.

    Built from the columns ``movie_id``, ``title``, ``canonical_movie_id`` and ``year`` of the
    ``movies`` table. Where a spelling stands for several films the smallest id comes first.
    """

    def __init__(self, movies: pd.DataFrame) -> None:
        frame = movies.sort_values(["canonical_movie_id", "movie_id"])
        self.titles: dict[int, str] = {}
        self.exact: dict[str, int] = {}
        primary: dict[tuple[str, int | None], list[int]] = defaultdict(list)
        other: dict[tuple[str, int | None], set[int]] = defaultdict(set)
        yearless: dict[str, set[int]] = defaultdict(set)
        forms: dict[int | None, list[tuple[str, int]]] = defaultdict(list)
        columns = (frame[name] for name in ("canonical_movie_id", "title", "year"))
        for movie, raw_title, raw_year in zip(*columns, strict=True):
            movie_id, title = int(movie), str(raw_title).strip()
            year = split_year(title)[1] if pd.isna(raw_year) else int(raw_year)
            self.titles.setdefault(movie_id, title)
            self.exact.setdefault(title, movie_id)
            primary[normalise_title(title), year].append(movie_id)
            for variant in title_variants(title):
                key = normalise_title(variant)
                other[key, year].add(movie_id)
                yearless[key].add(movie_id)
            for form in _forms(title_variants(title)):
                forms[None].append((form, movie_id))
                if year is not None:
                    forms[year].append((f"{form} {year}", movie_id))
        # Films may share an alternative title, and remakes share a name: those keys say nothing.
        self.normalised = {key: min(found) for key, found in other.items() if len(found) == 1}
        self.normalised |= {key: min(found) for key, found in primary.items()}
        self.yearless = {key: min(found) for key, found in yearless.items() if len(found) == 1}
        #: year → (comparison forms, the film of each); under None every film without its year.
        self.forms = {
            year: ([form for form, _ in pairs], [movie_id for _, movie_id in pairs])
            for year, pairs in forms.items()
        }


class Grounder:
    """Grounds texts in one catalogue by one recipe; equal texts always get equal matches.

    ``ladder``: the title itself; then the same title up to case, accents, punctuation, article and
    alternative titles (a year, where given, must be right; without one the name must mean a single
    film); then RapidFuzz similarity of at least ``threshold``, guarded by the year, by numerals
    ("Rocky II" is not "Rocky III"), by length and by a margin to the next film; else refused.

    ``paper``: the published rule, the best WRatio over all titles, which never refuses.
    """

    def __init__(self, catalogue: Catalogue, recipe: GroundingRecipe) -> None:
        self._catalogue = catalogue
        self._recipe = recipe
        self._paper_ids = list(catalogue.titles)
        self._paper_titles = list(catalogue.titles.values())

    def ground(self, texts: Sequence[str]) -> list[Match]:
        """One match per text, in order."""
        one = self._paper if self._recipe.method == "paper" else self._ladder
        matches = {text: one(text) for text in dict.fromkeys(texts)}
        return [matches[text] for text in texts]

    def _paper(self, text: str) -> Match:
        best = process.extractOne(text, self._paper_titles, scorer=fuzz.WRatio)
        if best is None:  # only an empty catalogue
            return REFUSED
        _, score, position = best
        return Match(self._paper_ids[position], "similar", float(score))

    def _ladder(self, text: str) -> Match:
        text = text.strip()
        if text in self._catalogue.exact:
            return Match(self._catalogue.exact[text], "exact")
        if not text or len(text) > _LONGEST_TEXT:
            return REFUSED
        movie_id = self._normalised(text)
        if movie_id is not None:
            return Match(movie_id, "normalised")
        return self._similar(text)

    def _normalised(self, text: str) -> int | None:
        _, year = split_year(text)
        for variant in title_variants(text):
            key = normalise_title(variant)
            found = (
                self._catalogue.yearless.get(key)
                if year is None
                else self._catalogue.normalised.get((key, year))
            )
            if key and found is not None:
                return found
        return None

    def _similar(self, text: str) -> Match:
        name, year = split_year(text)
        forms, movie_ids = self._catalogue.forms.get(year, ([], []))
        threshold = self._recipe.threshold
        scores: dict[int, float] = {}
        for query in _forms([name]):
            # The year takes part in the score (it is agreed evidence), not in the numerals.
            asked = query if year is None else f"{query} {year}"
            numerals = _numerals(asked)
            for form, score, position in process.extract(
                asked, forms, scorer=fuzz.WRatio, score_cutoff=threshold, limit=None
            ):
                full_length = max(fuzz.ratio(asked, form), fuzz.token_sort_ratio(asked, form))
                if full_length < threshold - _FULL_LENGTH_ALLOWANCE or _numerals(form) != numerals:
                    continue
                movie_id = movie_ids[position]
                scores[movie_id] = max(score, scores.get(movie_id, 0.0))
        if not scores:
            return REFUSED
        ranked = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
        best_id, best = ranked[0]
        name_of_best = normalise_title(self._catalogue.titles[best_id])
        for other_id, score in ranked[1:]:
            if best - score >= _MARGIN:
                break
            # A film listed twice under two spellings is no doubt about the film.
            if normalise_title(self._catalogue.titles[other_id]) != name_of_best or year is None:
                return REFUSED
        return Match(best_id, "similar", float(best))


def _forms(names: Iterable[str]) -> list[str]:
    """Spellings compared by similarity: article dropped, in front and where it stood."""
    forms: dict[str, None] = {}
    for name in names:
        forms[normalise_title(name)] = None
        forms[fold(article_first(name))] = None
        forms[fold(name)] = None
    return [form for form in forms if form]


def _numerals(form: str) -> list[str]:
    return sorted(word for word in form.split() if _NUMERAL.fullmatch(word))
