"""Natural variants of film titles by kind, and which films such a text fits.

What belongs here: how people and models write a title that the catalogue spells otherwise. What
does not: any function of the ladder under test. Nothing is imported from ``llmrec_assets``, so a
mistake in its reading of titles is not repeated by the measure.
"""

from __future__ import annotations

import random
import re
import string
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_TRAILING = re.compile(r"^(.+), (The|An?|La|Les?|L'|Il|Lo|El|Los|Las|Der|Die|Das|Det|O|I)$")
_YEAR = re.compile(r"^(.*?) *\((\d{4})\)$")
_ALTERNATIVES = re.compile(r" *\(([^()]*)\)")

#: The kinds of the issue, in its words, with the share that must be right.
GOALS = {
    "article moved": 0.99,
    "year dropped": 0.99,
    "subtitle dropped": 0.99,
    "one typo": 0.90,
    "case": 0.99,
    "ASCII-folded": 0.99,
    "genres appended": 0.99,
    # and three that happen as often
    "article moved, year dropped": 0.99,
    "alternative title": 0.99,
    "punctuation dropped": 0.99,
}
#: Printed, without a goal: half the evidence is gone.
WITHOUT_GOAL = ("one typo, year dropped",)
TYPOS_PER_TITLE = 3


@dataclass(frozen=True)
class Film:
    """``movie_id`` is canonical."""

    movie_id: int
    title: str
    genres: tuple[str, ...]

    @property
    def name(self) -> str:
        """The title without its year."""
        found = _YEAR.match(self.title)
        return found[1] if found else self.title

    @property
    def year(self) -> str:
        """With its brackets and the blank before them; empty where there is none."""
        found = _YEAR.match(self.title)
        return f" ({found[2]})" if found else ""


@dataclass(frozen=True)
class Variant:
    """A way to write one film."""

    movie_id: int
    kind: str
    text: str


def variants(film: Film, seed: int) -> Iterator[Variant]:
    """Every variant of every kind that differs from the title itself, none twice in a kind."""
    dice = random.Random(f"{seed} {film.title}")
    texts: dict[str, list[str]] = {
        "article moved": [moved(film.name) + film.year],
        "year dropped": [film.name],
        "article moved, year dropped": [moved(film.name)] if moved(film.name) != film.name else [],
        "subtitle dropped": [short + film.year for short in short_names(film.name)],
        "alternative title": [part + film.year for part in parts(film.name)],
        "case": [film.title.lower(), film.title.upper()],
        "ASCII-folded": [folded(film.title)],
        "punctuation dropped": [re.sub(r"[^\w\s]", "", film.name) + film.year],
        "genres appended": genres_appended(film),
        "one typo": [typo(film.name, dice) + film.year for _ in range(TYPOS_PER_TITLE)],
        "one typo, year dropped": [typo(film.name, dice)],
    }
    for kind, some in texts.items():
        for text in dict.fromkeys(some):
            if text not in (film.title, ""):
                yield Variant(film.movie_id, kind, text)


def moved(name: str) -> str:
    """Every trailing article in front, in parentheses too: "Net, The" → "The Net"."""
    inside = _ALTERNATIVES.sub(lambda found: f" ({_front(found[1].strip())})", name)
    main, bracket, rest = inside.partition(" (")
    return _front(main) + bracket + rest


def _front(name: str) -> str:
    found = _TRAILING.match(name)
    if not found:
        return name
    return found[2] + ("" if found[2].endswith("'") else " ") + found[1]


def parts(name: str) -> list[str]:
    """The main title and each alternative, where there is one: "Seven (Se7en)" → both."""
    alternatives = [re.sub(r"^a\.?k\.?a\.? *", "", alt) for alt in _ALTERNATIVES.findall(name)]
    main = _ALTERNATIVES.sub("", name).strip()
    return [part for part in (main, *map(str.strip, alternatives)) if part != name]


def short_names(name: str) -> list[str]:
    """The main title up to each of its subtitles."""
    main = _ALTERNATIVES.sub("", name).strip()
    return [main[: at.start()] for at in re.finditer(r",? or: |: | - ", main)]


def folded(text: str) -> str:
    """Accents gone, as on a keyboard without them."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if c.isascii())


def genres_appended(film: Film) -> list[str]:
    """As the prompt shows them, and as models write them."""
    if not film.genres:
        return []
    comma, bar = ", ".join(film.genres), "|".join(film.genres)
    ends = (f" [{comma}]", f" ({comma})", f" - {comma}", f" | {bar}")
    return [film.title + end for end in ends] + [film.name + ends[0]]


def typo(name: str, dice: random.Random) -> str:
    """One letter replaced, left out or doubled by another, or two neighbours swapped.

    Only letters: a wrong digit is another film ("Rocky 2").
    """
    letters = [at for at, char in enumerate(name) if char.isalpha()]
    swaps = [at for at in letters if at + 1 in letters and name[at].lower() != name[at + 1].lower()]
    if not letters:
        return name
    at = dice.choice(letters)
    other = dice.choice([c for c in string.ascii_lowercase if c != name[at].lower()])
    how = dice.choice(("replaced", "left out", "inserted", *(["swapped"] if swaps else [])))
    if how == "replaced":
        return name[:at] + other + name[at + 1 :]
    if how == "left out" and len(letters) > 1:
        return name[:at] + name[at + 1 :]
    if how == "swapped":
        at = dice.choice(swaps)
        return name[:at] + name[at + 1] + name[at] + name[at + 2 :]
    return name[:at] + other + name[at:]


class Readings:
    """Which films a text fits, read generously: letters and digits count, articles do not."""

    def __init__(self, films: Mapping[int, Film]) -> None:
        self._whole: dict[str, set[int]] = defaultdict(set)
        self._short: dict[str, set[int]] = defaultdict(set)
        for film in films.values():
            for name in (film.name, *parts(film.name)):
                self._whole[_key(name)].add(film.movie_id)
                self._whole[_key(name) + film.year].add(film.movie_id)
            for name in short_names(film.name):
                self._short[_key(name) + film.year].add(film.movie_id)

    def fits(self, variant: Variant, film: Film) -> frozenset[int]:
        """The films whose name, alternative name or (where none has it) short name it is.

        Read without its genres, and with its year where it has one. Empty for most typos.
        """
        text = variant.text
        if variant.kind == "genres appended":
            text = film.title if film.year and film.year in text else film.name
        found = _YEAR.match(text)
        key = f"{_key(found[1])} ({found[2]})" if found else _key(text)
        return frozenset(self._whole.get(key) or self._short.get(key) or ())


def _key(name: str) -> str:
    name = folded(moved(name)).lower().replace("&", " and ")
    name = re.sub(r"['`]", "", name)
    words = re.sub(r"[^a-z0-9]+", " ", name).split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("the", "a", "an") else words)
