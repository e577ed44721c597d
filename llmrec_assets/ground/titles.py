"""Film titles as people write them: one spelling to compare by.

What belongs here: taking a title apart (name, year, article, alternative titles) and folding
it to a form in which "Net, The (1995)" and "the net" meet. What does not: deciding which film a
text means (``grounding``) and finding titles in a response (``completions``).
"""

from __future__ import annotations

import re
import unicodedata

#: Articles MovieLens moves behind the name ("Postino, Il"). All of them are moved to the front;
#: only the English ones are dropped, since "Die Hard" must not become "hard".
_TRAILING_ARTICLES = frozenset(
    (
        *("the", "a", "an", "le", "la", "les", "l'", "un", "une"),
        *("il", "lo", "el", "los", "las", "der", "die", "das"),
    )
)
_LEADING_ENGLISH = re.compile(r"\A(?:the|an?)\s+(?=\S)", re.IGNORECASE)
_YEAR = re.compile(r"[(\[](\d{4})[)\]]\s*(?:\((?:V|TV|VG)\)\s*)?\Z")
_PARENTHESES = re.compile(r"\(([^()]*)\)")
_ALSO_KNOWN_AS = re.compile(r"\A\s*a\.?k\.?a\.?\s+", re.IGNORECASE)
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u00b4`", "'"))
_NOT_WORD = re.compile(r"[\W_]+")
_SUBTITLE = re.compile(r",?\s+or:\s+|:\s+|\s+[-\u2013\u2014]\s+", re.IGNORECASE)
_BEHIND_YEAR = re.compile(r"[(\[]\d{4}[)\]](?:\s*\((?:V|TV|VG)\))?")
#: What MovieLens calls a film, and the same in a model's words.
_GENRE = (
    r"(?:action|adventure|animat(?:ion|ed)|biography|child(?:ren)?(?:'?s)?|comedy|crime"
    r"|documentary|drama|family|fantasy|film[- ]noir|history|horror|imax|music(?:al)?|mystery"
    r"|romance|romantic comedy|sci-?fi|science fiction|sport|thriller|unknown|war|western)"
)
_GENRES = rf"{_GENRE}(?:\s*(?:[,/|;&]|\band\b)\s*{_GENRE})*"
_APPENDED_GENRES = re.compile(
    rf"\s*(?:[(\[]{_GENRES}[)\]]|(?:[|:;]|\s[-\u2013\u2014])\s*{_GENRES})\s*\Z", re.IGNORECASE
)


def split_year(title: str) -> tuple[str, int | None]:
    """Name and year: "Heat (1995)" gives ``("Heat", 1995)``, "Heat" gives ``("Heat", None)``.

    Only a year in brackets at the end counts: "Godzilla 2000" is a name. A medium behind the year,
    as in "(1995) (V)", goes with it.
    """
    title = title.strip()
    found = _YEAR.search(title)
    if found is None:
        return title, None
    return title[: found.start()].rstrip(), int(found.group(1))


def title_variants(title: str) -> list[str]:
    """The names a title offers, without year: the whole name, its main part, each alternative.

    >>> title_variants("Seven (Se7en) (1995)")
    ['Seven (Se7en)', 'Seven', 'Se7en']
    """
    name, _ = split_year(title)
    main, alternatives = _parts(name)
    variants = dict.fromkeys([name, main, *alternatives])
    return [variant for variant in variants if variant]


def short_names(title: str) -> list[str]:
    """What is left of a title's names without a subtitle, without year; the longest first.

    >>> short_names("Star Wars: Episode IV - A New Hope (1977)")
    ['Star Wars: Episode IV', 'Star Wars']
    >>> short_names("Heat (1995)")
    []
    """
    name, _ = split_year(title)
    main, alternatives = _parts(name)
    short = [
        part[: at.start()] for part in (main, *alternatives) for at in _SUBTITLE.finditer(part)
    ]
    return sorted(filter(None, dict.fromkeys(short)), key=len, reverse=True)


def without_genres(text: str) -> str:
    """A title without what was appended to it: anything behind its year, or a list of genres.

    Two bracketed years are two films, or none: such a text stays as it is.

    >>> without_genres("Heat (1995) | Action, Crime"), without_genres("Heat [Action, Crime]")
    ('Heat (1995)', 'Heat')
    """
    years = [found for found in _BEHIND_YEAR.finditer(text) if text[: found.start()].strip()]
    if len(years) == 1:
        return text[: years[0].end()]
    return text if years else _APPENDED_GENRES.sub("", text) or text


def fold(text: str) -> str:
    """Case, accents and punctuation folded; the words stay in their order.

    An apostrophe joins ("Schindler's" is "schindlers"), other punctuation separates.
    """
    plain = text.translate(_APOSTROPHES).casefold()
    if not plain.isascii():  # nothing to decompose otherwise, and most titles are
        decomposed = unicodedata.normalize("NFKD", plain)
        plain = "".join(char for char in decomposed if not unicodedata.combining(char)).casefold()
    plain = plain.replace("&", " and ").replace("'", "")
    return _NOT_WORD.sub(" ", plain).strip()


def article_first(name: str) -> str:
    """Moves a trailing article to the front: "Postino, Il" gives "Il Postino"."""
    name = name.translate(_APOSTROPHES).strip()
    head, comma, tail = name.rpartition(",")
    article = tail.strip()
    if not comma or not head.strip() or article.casefold() not in _TRAILING_ARTICLES:
        return name
    return f"{article}{'' if article.endswith(chr(39)) else ' '}{head.strip()}"


def normalise_title(title: str) -> str:
    """The form two spellings of one name share; the year stands apart (``split_year``).

    >>> normalise_title("Net, The (1995)"), normalise_title("the net")
    ('net', 'net')
    """
    name, _ = split_year(title)
    main, alternatives = _parts(name)
    return " ".join(filter(None, (_normalise_part(part) for part in (main, *alternatives))))


def _parts(name: str) -> tuple[str, list[str]]:
    alternatives = [_ALSO_KNOWN_AS.sub("", found).strip() for found in _PARENTHESES.findall(name)]
    return " ".join(_PARENTHESES.sub(" ", name).split()), alternatives


def _normalise_part(part: str) -> str:
    moved = article_first(part)
    if moved[:3].casefold() == "l' ":
        moved = f"l'{moved[3:].lstrip()}"
    return fold(_LEADING_ENGLISH.sub("", moved))
