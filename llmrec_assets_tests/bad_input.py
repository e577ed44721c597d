"""Every kind of malformed input that is tried, in one list: what it is and what must be said.

The tests run each case (``test_bad_input.py`` and the tests of the modules concerned) and
``docs/bad-input.md`` is written from the same list, so that table and tests cannot diverge:

    python llmrec_assets_tests/bad_input.py > docs/bad-input.md
"""

from __future__ import annotations

from dataclasses import dataclass

T = 880_000_000  # some time in 1997

# Films, users and ratings here are invented: MovieLens rows may not be redistributed.
NO_GENRES = "|0" * 19
DRAMA = "|0" * 8 + "|1" + "|0" * 10
ITEM = (
    f"1|Tin Lighthouse, The (1991)|04-Mar-1991||http://x.invalid/1{DRAMA}\n"
    f"2|unknown|||{NO_GENRES}\n"
    f"3|Caf\xe9 at Noon: Part 3 (1989) (1990) (V)  |4-Feb-1990||{'|1' * 2 + '|0' * 17}\n"
    f"7|Tin Lighthouse, The (1991) |05-Mar-1991||{DRAMA}\n"
).encode("latin-1")
USER = b"1|24|M|technician|02139\n2|53|F|other|V5K0A\n5|33|F|writer|94043-1234\n"
DATA = b"2\t3\t5\t880000002\n1\t7\t1\t880000001\n1\t3\t4\t880000001\n1\t1\t3\t870000000\n"

MOVIES_DAT = b"1::Kites: A Story (1951)::Animation|Children's\n12::L'\xe9t\xe9 vert (1972)::\n"
USERS_DAT = b"1::F::1::10::02139\n2::M::56::16::070072\n"
RATINGS_DAT = b"1::12::5::978300760\n2::1::4::978300761\n1::1::3::978300759\n"

HEADER = "user_id,movie_id,rating,timestamp\n"


@dataclass(frozen=True)
class BadFile:
    """A file with this content; ``said`` stands in the message."""

    file: str
    content: bytes
    what: str
    said: str


def _data(content: bytes, what: str, said: str) -> BadFile:
    return BadFile("u.data", content, what, said)


def _item(content: bytes, what: str, said: str) -> BadFile:
    return BadFile("u.item", content, what, said)


def _user(content: bytes, what: str, said: str) -> BadFile:
    return BadFile("u.user", content, what, said)


ML_100K = [
    _data(
        DATA + b"1\t2\t3\n",
        "a field missing",
        "row 5 of u.data has 3 fields, expected 4 (user, item, rating",
    ),
    _data(
        DATA + b"1\t2\t3\t4\t5\n", "a field too many", "row 5 of u.data has 5 fields, expected 4"
    ),
    _data(
        DATA.replace(b"\t", b"::"),
        "the other format's separator",
        "row 1 of u.data has 1 field, expected 4",
    ),
    _data(DATA.replace(b"\n", b"\n\n", 1), "a blank row", "row 2 of u.data is blank, expected 4"),
    _data(
        DATA.replace(b"\t4\t", b"\tfour\t"),
        "a rating in words",
        "row 3 of u.data has rating 'four', expected",
    ),
    _data(
        DATA.replace(b"\t4\t", b"\t4.5\t"),
        "half a star",
        "row 3 of u.data has rating '4.5', expected",
    ),
    _data(DATA.replace(b"\t4\t", b"\t\t"), "no rating", "row 3 of u.data has rating '', expected"),
    _data(
        DATA.replace(b"\t4\t", b"\t0\t"),
        "no stars",
        "row 3 of u.data has rating 0, expected 1 to 5",
    ),
    _data(
        DATA.replace(b"\t4\t", b"\t999\t"),
        "999 stars",
        "row 3 of u.data has rating 999, expected 1",
    ),
    _data(
        DATA.replace(b"\t4\t", b"\t" + b"9" * 50 + b"\t"),
        "a number of fifty digits",
        "row 3 of u.data has rating '99",
    ),
    _data(
        DATA.replace(b"\t4\t", b"\t\xb2\t"),
        "a superscript digit",
        "row 3 of u.data has rating '²', expected",
    ),
    _data(
        DATA.replace(b"\t87", b"\t-87"),
        "a time before 1970",
        "row 4 of u.data has timestamp -870000000",
    ),
    _data(
        DATA.replace(b"002\n", b"002000\n"),
        "milliseconds",
        "row 1 of u.data has timestamp 880000002000",
    ),
    _data(
        DATA.replace(b"880000001", b"0"),
        "no time",
        "row 2 of u.data has timestamp 0, expected Unix",
    ),
    _data(DATA.replace(b"880000001", b"0"), "the same in two rows", "(2 such rows)"),
    _data(
        DATA.replace(b"2\t3", b"9\t3"),
        "an unknown user",
        "row 1 of u.data names user 9, which u.user does",
    ),
    _data(
        DATA.replace(b"2\t3", b"2\t9"),
        "an unknown film",
        "row 1 of u.data names movie 9, which u.item does",
    ),
    _data(
        DATA + b"1\t7\t5\t9\n",
        "a film rated twice",
        "row 5 of u.data repeats user 1 and movie 7 of row 2.",
    ),
    _data(b"", "an empty file", "u.data is empty (no row 1)"),
    _data(b" \n\n", "blank lines alone", "u.data is empty (no row 1)"),
    _data(
        b"\xef\xbb\xbf" + DATA,
        "a byte-order mark",
        "row 1 of u.data shows that the file is UTF-8 with a byte",
    ),
    _data(
        DATA.decode().encode("utf-16"),
        "UTF-16",
        "row 1 of u.data shows that the file is UTF-16",
    ),
    _data(
        DATA.decode().encode("utf-16-le"),
        "UTF-16 without a mark",
        "row 1 of u.data shows that the file is UTF-16",
    ),
    _data(
        DATA[:-3] + b"\0" * 3,
        "NUL bytes at the end",
        "row 4 of u.data shows that the file is UTF-16 or binary",
    ),
    _item(
        ITEM.decode("latin-1").encode(),
        "UTF-8 titles",
        "row 3 of u.item shows that the file is UTF-8,",
    ),
    _item(
        ITEM.decode("latin-1").encode(),
        "the same: the way out",
        "iconv -f utf-8 -t latin1 u.item",
    ),
    _item(ITEM + ITEM[:80], "a row cut off", "row 5 of u.item has"),
    _item(ITEM.replace(b"7|", b"1|", 1), "an id twice", "row 4 of u.item repeats id 1 of row 1."),
    _item(ITEM.replace(b"7|", b"0|", 1), "the id 0", "row 4 of u.item has id 0, expected 1 to"),
    _item(
        ITEM.replace(b"7|", b"x|", 1),
        "a letter for an id",
        "row 4 of u.item has id 'x', expected a whole",
    ),
    _item(ITEM.replace(b"|unknown|", b"| |"), "no title", "row 2 of u.item has no title"),
    _item(
        ITEM.replace(b"|1|0", b"|7|0", 1),
        "a genre flag of 7",
        "row 1 of u.item has genre flag '7', expected",
    ),
    _item(
        ITEM.replace(b"04-Mar", b"31-Feb"),
        "the 31st of February",
        "row 1 of u.item has release date '31-Feb-1991",
    ),
    _item(
        ITEM.replace(b"04-Mar", b"04-M\xe4r"),
        "a month in German",
        "row 1 of u.item has release date '04-Mär-",
    ),
    _user(USER.replace(b"5|33", b"1|33"), "an id twice", "row 3 of u.user repeats id 1 of row 1."),
    _user(
        USER.replace(b"|33|", b"|333|"),
        "an age of 333",
        "row 3 of u.user has age 333, expected 1 to 120",
    ),
    _user(USER.replace(b"|33|", b"||"), "no age", "row 3 of u.user has age '', expected a whole"),
    _user(
        USER.replace(b"|F|w", b"|X|w"),
        "another gender",
        "row 3 of u.user has gender 'X', expected M or F",
    ),
    _user(USER.replace(b"writer", b""), "no occupation", "row 3 of u.user has no occupation"),
    _user(
        USER.replace(b"|other", b""),
        "a field missing",
        "row 2 of u.user has 4 fields, expected 5 (user, age",
    ),
]

ML_1M = [
    BadFile(
        "ratings.dat",
        RATINGS_DAT + b"1::2::3\n",
        "a field missing",
        "row 4 of ratings.dat has 3 fields, expected 4",
    ),
    BadFile(
        "ratings.dat",
        b"1:::12::5::9\n",
        "a colon too many",
        "row 1 of ratings.dat has item ':12', expected a whole",
    ),
    BadFile(
        "ratings.dat",
        b"1\t1\t5\t9\n",
        "the other format's separator",
        "row 1 of ratings.dat has 1 field, expected 4",
    ),
    BadFile(
        "ratings.dat",
        RATINGS_DAT.replace(b"::4::", b"::6::"),
        "six stars",
        "row 2 of ratings.dat has rating 6",
    ),
    BadFile(
        "movies.dat",
        b"1::A (1990)\n",
        "a field missing",
        "row 1 of movies.dat has 2 fields, expected 3 (id, title",
    ),
    BadFile(
        "movies.dat",
        MOVIES_DAT.decode("latin-1").encode(),
        "UTF-8 titles",
        "row 2 of movies.dat shows that the",
    ),
    BadFile(
        "users.dat",
        USERS_DAT.replace(b"::1::", b"::2::"),
        "an age code of 2",
        "row 1 of users.dat has age code 2,",
    ),
    BadFile(
        "users.dat",
        USERS_DAT.replace(b"::16::", b"::21::"),
        "an occupation code of 21",
        "row 2 of users.dat has occupation",
    ),
]


def _new(content: str | bytes, what: str, said: str) -> BadFile:
    data = content if isinstance(content, bytes) else content.encode()
    return BadFile("bad.csv", data, what, said)


#: In a data set with users 1 to 3 and films 10, 20, 30.
INCOMING = [
    _new("", "an empty file", "bad.csv is empty"),
    _new("\n\n", "blank lines alone", "bad.csv is empty"),
    _new(HEADER, "a header alone", "row 2 of bad.csv is missing: there is only a header"),
    _new("hello\n", "prose", "row 1 of bad.csv has no comma, tab or ::"),
    _new(f"1;10;5;{T}\n", "semicolons", "row 1 of bad.csv has no comma, tab or ::"),
    _new(f"1,10,5,{T}\n", "commas without a header", "a file with commas needs a header"),
    _new(
        f"user,film,stars,when\n1,10,5,{T}\n",
        "other column names",
        "names the columns user, film, stars, when, expected each of four once",
    ),
    _new(
        "user_id,movie_id,rating\n1,10,5\n",
        "a column missing",
        "names the columns user_id, movie_id, rating, expected each of four once",
    ),
    _new(
        f"user_id,movie_id,item_id,rating,timestamp\n1,10,10,5,{T}\n",
        "a column twice",
        "expected each of four once",
    ),
    _new(
        f"{HEADER}1,10,5,{T}\n1,20,5\n",
        "a field missing",
        "row 3 of bad.csv has 3 fields, expected 4",
    ),
    _new(f"{HEADER}1,10,5,{T}\n\n1,20,5,{T}\n", "a blank row", "row 3 of bad.csv is blank"),
    _new(
        f"{HEADER}1,10,good,{T}\n",
        "a rating in words",
        "row 2 of bad.csv has rating 'good', expected a whole number",
    ),
    _new(
        f"{HEADER}1,10,3.5,{T}\n",
        "half a star",
        "row 2 of bad.csv has rating '3.5', expected a whole number",
    ),
    _new(f"{HEADER}1,10,,{T}\n", "no rating", "row 2 of bad.csv has rating ''"),
    _new(
        f'{HEADER}"1",10,5,{T}\n',
        "a number in quotes",
        "row 2 of bad.csv has user '\"1\"', expected a whole number",
    ),
    _new(f"{HEADER}1,10,6,{T}\n", "six stars", "row 2 of bad.csv has rating 6, expected 1 to 5"),
    _new(f"{HEADER}1,10,0,{T}\n", "no stars", "row 2 of bad.csv has rating 0, expected 1 to 5"),
    _new(
        f"{HEADER}1,10,5,{T}000\n",
        "milliseconds",
        "expected Unix seconds between 1970 and 2100",
    ),
    _new(
        f"{HEADER}1,10,5,{T}\n9,10,5,{T}\n8,10,5,{T}\n",
        "unknown users",
        "row 3 of bad.csv names user 9, which u.user does not have (2 such rows)",
    ),
    _new(
        f"{HEADER}1,99,5,{T}\n",
        "an unknown film",
        "row 2 of bad.csv names movie 99, which u.item does not have",
    ),
    _new(
        f"1\t10\t5\t{T}\n1::10::5::{T}\n",
        "two formats in one file",
        "row 2 of bad.csv has 1 field, expected 4",
    ),
    _new(b"\xff\xfe1\x00,\x00", "UTF-16", "shows that the file is UTF-16"),
    _new(b"\x00\x01\x02,\x03", "binary", "binary (it holds NUL bytes)"),
    _new(
        b"\xef\xbb\xbf" + HEADER.encode(),
        "a byte-order mark",
        "shows that the file is UTF-8 with a byte-order mark",
    ),
    _new(
        f"{HEADER}1,10,5,99999999999999999999\n",
        "a number of twenty digits",
        "has timestamp '99999999999999999999'",
    ),
]


@dataclass(frozen=True)
class BadValue:
    """A recipe, a valid one but for this value; ``said`` stands in the message after the file."""

    path: str
    value: object
    said: str

    @property
    def what(self) -> str:
        return f"`{self.path}: {self.value!r}`"


RECIPE = [
    *(
        BadValue(path, value, f"{path}: ")
        for path, value in [
            ("expected_peak_memory_gb", 0),
            ("expected_peak_memory_gb", float("inf")),
            ("windows.window_size", 0),
            ("windows.window_size", 2.5),
            ("windows.balance", "neither"),
            ("windows.liked_min", 1),
            ("windows.liked_min", 6),
            ("windows.min_per_class", -1),
            ("windows.windows_per_user.train", 0),
            ("windows.protocol", "time"),
            ("windows.temporal_quantile", 1.0),
            ("windows.temporal_quantile", 0),
            ("prompts.template", "figure3"),
            ("prompts.max_per_class", 0),
            ("base_model.source", "torrent"),
            ("base_model.dtype", "float16"),
            ("sft.lora.dropout", 1.5),
            ("sft.lora.r", 0),
            ("sft.learning_rate", 0),
            ("sft.learning_rate", -1e-4),
            ("sft.learning_rate", float("nan")),
            ("sft.learning_rate", float("inf")),
            ("sft.learning_rate", "fast"),
            ("sft.epochs", 0),
            ("sft.batch_size", None),
            ("sft.max_examples", 0),
            ("generation.temperature", 0),
            ("generation.decodings", []),
            ("generation.decodings", ["greedy"]),
            ("generation.beams", 0),
            ("generation.candidates", "als"),
            ("generation.candidates_per_prompt", 0),
            ("generation.top_p", 1.01),
            ("generation.top_p", 0),
            ("grounding.threshold", 100.5),
            ("grounding.method", "guess"),
            ("evaluation.confidence", 1),
            ("evaluation.resamples", 0),
            ("windows", [10]),
        ]
    ),
    *(
        BadValue(path, 1, f"{path}: Extra inputs")
        for path in (
            "learning_rate",
            "sft.learning_rat",
            "windows.windows_per_user.tests",
            "sft.lora.rank",
        )
    ),
]


@dataclass(frozen=True)
class BadText:
    """A recipe file with this text."""

    text: str
    what: str
    said: str


RECIPE_TEXT = [
    *(
        BadText(text, what, "mine.yaml is not valid YAML")
        for text, what in [
            ("a: [1, 2", "a bracket left open"),
            ("a: b: c", "a colon too many"),
            ("\t- x", "a tab"),
            ("key: *nowhere", "an alias of nothing"),
            ("!!python/name:os.system x", "a Python object"),
        ]
    ),
    *(
        BadText(text, what, "mine.yaml: expected a mapping")
        for text, what in [
            ("", "an empty file"),
            ("- 1\n- 2\n", "a list"),
            ("just words", "prose"),
            ("3", "a number"),
        ]
    ),
    BadText("sft: {epochs: 1}\nseed: 1\nsft: {epochs: 3}\n", "a section twice", "sft stands twice"),
    BadText("sft:\n  epochs: 1\n  epochs: 3\n", "a key twice", "epochs stands twice"),
]


@dataclass(frozen=True)
class Harm:
    """Damage done to something published, by name (``test_bad_input.py`` knows how)."""

    name: str
    what: str
    said: str


CHECKPOINT = [
    Harm("flip", "one bit flipped in the weights", "model.safetensors does not match its manifest"),
    Harm("grow", "a byte appended to the weights", "model.safetensors does not match its manifest"),
    Harm("cut", "the weights cut off", "model.safetensors does not match its manifest"),
    Harm("gone", "the weights missing", "model.safetensors is missing"),
    Harm("flip-config", "one bit flipped in a file beside them", "does not match its manifest"),
    Harm("no-manifest", "no manifest", "manifest.json is missing"),
    Harm("empty-manifest", "an empty manifest", "manifest.json is damaged"),
    Harm("cut-manifest", "the manifest cut off", "manifest.json is damaged"),
    Harm("list-manifest", "a manifest that is a list", "manifest.json is damaged"),
    Harm("no-files", "a manifest that names no files", "manifest.json is damaged"),
    Harm("bad-fact", "a manifest whose file has no hash", "manifest.json is damaged"),
    Harm("binary-manifest", "a manifest that is no text", "manifest.json is damaged"),
    Harm("vanished", "the whole directory gone", "manifest.json is missing"),
    Harm("pointer", "the pointer cut off", "current.json is damaged"),
]

TABLE = [
    Harm("cut", "the file cut off", "is damaged"),
    Harm("text", "text in its place", "is damaged"),
    Harm("empty", "an empty file", "is damaged"),
    Harm("columns", "other columns", "was written by an older version of this project"),
    Harm("vanished", "the file gone", "is not kept any more"),
    Harm("pointer", "the pointer cut off", "current.json is damaged"),
    Harm("list-pointer", "a pointer that is a list", "current.json is damaged"),
]


@dataclass(frozen=True)
class BadEnvironment:
    """An environment variable with this value."""

    name: str
    value: str
    what: str
    said: str


ENVIRONMENT = [
    BadEnvironment("LLMREC_TIMEZONE", "Berlin", "a city alone", "is no time zone"),
    BadEnvironment("LLMREC_TIMEZONE", "../../etc/passwd", "a path", "is no time zone"),
    BadEnvironment(
        "LLMREC_ALERT_WEBHOOK", "http://example.org/T0p", "no encryption", "is not a https:// URL"
    ),
    BadEnvironment("LLMREC_ALERT_WEBHOOK", "T0p", "no URL", "is not a https:// URL"),
    BadEnvironment("LLMREC_DATA_DIR", "/nowhere", "no such place", "there is no such file"),
    BadEnvironment("LLMREC_SAMPLE_DIR", "/nowhere", "no such place", "has no u.data, u.item"),
]


@dataclass(frozen=True)
class Table:
    """One table of the page: rows of (where, what, said), and what each case is held to."""

    title: str
    kept: str
    rows: list[tuple[str, str, str]]


def tables() -> list[Table]:
    """Everything that is tried."""
    return [
        Table(
            "Files of ML-100K and of the sample",
            "nothing is copied or published: files are read before they are taken; what was "
            "published stays in force (`test_source.py`, through the assets)",
            [(f"`{case.file}`", case.what, case.said) for case in ML_100K],
        ),
        Table(
            "Files of ML-1M",
            "the same",
            [(f"`{case.file}`", case.what, case.said) for case in ML_1M],
        ),
        Table(
            "Incoming rating files",
            "the file lies whole in `quarantine/` with the message beside it; the good file that "
            "came with it is taken in",
            [("`incoming/`", case.what, case.said) for case in INCOMING],
        ),
        Table(
            "Recipes",
            "nothing runs; the message begins with the file and names every offending key",
            [
                *(("a value", case.what, case.said) for case in RECIPE),
                *(("the file", case.what, case.said) for case in RECIPE_TEXT),
            ],
        ),
        Table(
            "Checkpoints",
            "nothing loads it and nothing overwrites it; publishing again puts an intact one in "
            "force beside it",
            [("a checkpoint", case.what, case.said) for case in CHECKPOINT],
        ),
        Table(
            "Tables",
            "nothing reads it; materializing it again puts an intact one in force",
            [("a table", case.what, case.said) for case in TABLE],
        ),
        Table(
            "Environment",
            "nothing runs, nothing is sent; a webhook's URL is not shown",
            [(f"`{case.name}`", case.what, case.said) for case in ENVIRONMENT],
        ),
    ]


def page() -> str:
    """``docs/bad-input.md``."""
    number = sum(len(table.rows) for table in tables())
    lines = [
        "# Bad input: what was tried, what was said, what was preserved",
        "",
        "Written from the cases that the tests run (`llmrec_assets_tests/bad_input.py`); a test "
        "compares this page with them.",
        f"{number} cases. Beside them, hypothesis damages bytes at random: MovieLens files, zips, "
        "incoming rating files, manifests; whatever comes is refused in words, or is valid.",
    ]
    for table in tables():
        lines += [
            "",
            f"## {table.title}",
            "",
            f"Preserved: {table.kept}.",
            "",
            "| in | tried | said (part of the message) |",
            "|---|---|---|",
        ]
        lines += [
            f"| {where} | {what.replace('|', chr(92) + '|')} | {said.strip()} |"
            for where, what, said in table.rows
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
