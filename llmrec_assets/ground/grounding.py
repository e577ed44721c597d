"""Grounding: which film of the catalogue an item of a response means, if any.

What belongs here: the ladder exact → normalised → similar → refused, and the published rule it is
compared with. What does not: finding the items in a response (``completions``), taking titles
apart (``titles``) and indexing them (``title_index``). Seen films and duplicates are judged later,
by the recommendations. How good it is: ``bench/grounding``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rapidfuzz import fuzz, process

from llmrec_assets.ground.recipes import GroundingRecipe
from llmrec_assets.ground.title_index import (
    Catalogue,
    Forms,
    comparison_forms,
    numerals,
    sort_words,
)
from llmrec_assets.ground.titles import (
    normalise_title,
    split_year,
    title_variants,
    without_genres,
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
#: Texts compared at once: bounds the memory to this many times the spellings of a catalogue.
_BATCH = 512


@dataclass(frozen=True)
class Match:
    """Where a text landed. ``movie_id`` is canonical; None exactly when refused.

    ``similarity`` (0 to 100) is the score a similar match was accepted at, otherwise None.
    """

    movie_id: int | None
    method: Method
    similarity: float | None = None


REFUSED = Match(None, "refused")


class Grounder:
    """Grounds texts in one catalogue by one recipe; equal texts always get equal matches.

    ``ladder``: the title itself; then the same title up to case, accents, punctuation, article,
    alternative titles, a dropped subtitle and appended genres (a year, where given, must be right;
    without one the name must mean a single film); then RapidFuzz similarity of at least
    ``threshold``, guarded by the year, by numerals ("Rocky II" is not "Rocky III"), by length and
    by a margin to the next film; else refused.

    ``paper``: the published rule, the best WRatio over all titles, which never refuses.
    """

    def __init__(self, catalogue: Catalogue, recipe: GroundingRecipe) -> None:
        self._catalogue = catalogue
        self._recipe = recipe
        titles = catalogue.titles if recipe.method == "paper" else {}
        self._paper_ids = list(titles)
        self._paper_titles = list(titles.values())

    def ground(self, texts: Sequence[str]) -> list[Match]:
        """One match per text, in order. Many texts at once are faster than one by one."""
        distinct = list(dict.fromkeys(texts))
        if self._recipe.method == "paper":
            matches = {text: self._paper(text) for text in distinct}
        else:
            named = {text: self._named(text.strip()) for text in distinct}
            similar = self._similar([text for text, match in named.items() if match is None])
            matches = {text: match or similar[text] for text, match in named.items()}
        return [matches[text] for text in texts]

    def _paper(self, text: str) -> Match:
        best = process.extractOne(text, self._paper_titles, scorer=fuzz.WRatio)
        if best is None:  # only an empty catalogue
            return REFUSED
        _, score, position = best
        return Match(self._paper_ids[position], "similar", float(score))

    def _named(self, text: str) -> Match | None:
        """The first two rungs; ``None``: the similarity must tell."""
        movie_id = self._catalogue.exact(text)
        if movie_id is not None:
            return Match(movie_id, "exact")
        if not text or len(text) > _LONGEST_TEXT:
            return REFUSED
        for asked in dict.fromkeys((text, without_genres(text))):
            _, year = split_year(asked)
            for variant in title_variants(asked):
                key = normalise_title(variant)
                movie_id = self._catalogue.named(key, year) if key else None
                if movie_id is not None:
                    return Match(movie_id, "normalised")
        return None

    def _similar(self, texts: Sequence[str]) -> dict[str, Match]:
        """The third rung, for many texts at once: a text meets the films of its year only."""
        asked: dict[int | None, list[tuple[str, str]]] = defaultdict(list)
        for text in texts:
            name, year = split_year(without_genres(text.strip()))
            for form in comparison_forms([name]):
                # The year takes part in the score: it is agreed evidence.
                asked[year].append((text, form if year is None else f"{form} {year}"))
        matches = dict.fromkeys(texts, REFUSED)
        for year, queries in asked.items():
            forms = self._catalogue.forms(year)
            if forms is None:
                continue
            scores: dict[str, dict[int, float]] = defaultdict(dict)
            for text, movie_id, score in self._scored(queries, forms):
                scores[text][movie_id] = max(score, scores[text].get(movie_id, 0.0))
            for text, by_film in scores.items():
                matches[text] = self._decided(by_film, year)
        return matches

    def _scored(
        self, queries: Sequence[tuple[str, str]], forms: Forms
    ) -> Iterator[tuple[str, int, float]]:
        """(text, film, WRatio) wherever a spelling passes the threshold and its guards.

        Almost every pair fails the guard of full length, which RapidFuzz computes for all pairs at
        once some 20 times faster than one WRatio; WRatio is computed where it is passed.
        """
        threshold = self._recipe.threshold
        full_length = threshold - _FULL_LENGTH_ALLOWANCE
        for start in range(0, len(queries), _BATCH):
            batch = queries[start : start + _BATCH]
            given = [query for _, query in batch]
            ratios = np.maximum(
                _ratios(given, forms.texts, full_length),
                _ratios([sort_words(query) for query in given], forms.sorted_texts, full_length),
            )
            for row, column in zip(*np.nonzero(ratios >= full_length), strict=True):
                text, query = batch[row]
                form, movie_id = forms.texts[column], forms.movie_ids[column]
                if not self._catalogue.has(movie_id) or forms.numerals[column] != numerals(query):
                    continue
                score = fuzz.WRatio(query, form)
                if score >= threshold:
                    yield text, movie_id, float(score)

    def _decided(self, scores: dict[int, float], year: int | None) -> Match:
        """The best film, unless another one is as likely."""
        ranked = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
        best_id, best = ranked[0]
        name_of_best = normalise_title(self._catalogue.title(best_id))
        for other_id, score in ranked[1:]:
            if best - score >= _MARGIN:
                break
            # A film listed twice under two spellings is no doubt about the film.
            if normalise_title(self._catalogue.title(other_id)) != name_of_best or year is None:
                return REFUSED
        return Match(best_id, "similar", best)


def _ratios(queries: Sequence[str], forms: Sequence[str], at_least: float) -> np.ndarray:
    """``fuzz.ratio`` of every query (rows) with every form (columns), 0 where below ``at_least``.

    In double precision, so that the cut is where ``fuzz.ratio`` itself would cut.
    """
    found: np.ndarray = process.cdist(
        queries, forms, scorer=fuzz.ratio, score_cutoff=max(at_least, 0.0), dtype=np.float64
    )
    return found
