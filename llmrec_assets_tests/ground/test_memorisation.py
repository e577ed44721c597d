"""Memorisation: questions in the source's own format, a control, and what counts as a hit."""

from __future__ import annotations

from collections import Counter

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec_assets.ground.memorisation import (
    Question,
    SourceRows,
    matches,
    memorisation_questions,
    memorisation_table,
    read_source_rows,
)
from llmrec_assets.ground.recipes import ProbeRecipe

N_FILMS, N_RATINGS = 12, 30
ROWS = SourceRows(
    movies=[[str(i), f"Film {chr(64 + i)} (19{50 + i})", "Drama"] for i in range(1, N_FILMS + 1)],
    ratings=[
        [str(1 + i // 10), str(1 + i % N_FILMS), str(3 + i % 3), str(900 + i)]
        for i in range(N_RATINGS)
    ],
    separator="::",
    ratings_separator="\t",
)
RECIPE = ProbeRecipe(n=5, context_rows=3, shots=2)


def of(task: str, condition: str, rows: SourceRows = ROWS) -> list[Question]:
    questions = memorisation_questions(rows, RECIPE, seed=1)
    return [q for q in questions if (q.task, q.condition) == (task, condition)]


def test_next_title_shows_the_files_own_rows_up_to_the_title() -> None:
    text = "\n".join("::".join(row) for row in ROWS.movies)
    questions = of("next title", "source")
    assert len(questions) == 5
    for q in questions:
        assert q.prompt + q.answer in text
        assert q.prompt.count("\n") == 3 and q.prompt.endswith("::")
        assert q.answer not in q.prompt


def test_title_of_id_shows_other_rows_without_the_rest() -> None:
    pairs = {f"{row[0]}::{row[1]}" for row in ROWS.movies}
    for q in of("title of id", "source"):
        *shots, last = q.prompt.split("\n")
        assert len(set(shots)) == 2 and set(shots) <= pairs
        assert last + q.answer in pairs - set(shots)


def test_next_rating_shows_rows_of_the_file_and_asks_the_whole_next_one() -> None:
    text = "\n".join("\t".join(row) for row in ROWS.ratings) + "\n"
    for q in of("next rating", "source"):
        assert q.prompt + q.answer + "\n" in text
        assert q.prompt.count("\n") == 3 and q.answer.count("\t") == 3


def test_the_control_asks_the_same_ids_for_another_films_title() -> None:
    for task in ("next title", "title of id"):
        source, control = of(task, "source"), of(task, "control")
        ids = [[q.prompt.rsplit("\n")[-1] for q in qs] for qs in (source, control)]
        assert ids[0] == ids[1]
        assert sum(a.answer != b.answer for a, b in zip(source, control, strict=True)) >= 3
        titles = {row[1] for row in ROWS.movies}
        assert {q.answer for q in control} <= titles


def test_the_control_of_ratings_moves_all_ids_by_a_constant_and_nothing_else() -> None:
    """What can be counted stays: only what is remembered goes."""
    source, control = of("next rating", "source"), of("next rating", "control")
    moves = set()
    for a, b in zip(source, control, strict=True):
        lines = [(q.prompt + q.answer).split("\n") for q in (a, b)]
        for row, other in zip(*lines, strict=True):
            (user, movie, *rest), (user2, movie2, *rest2) = row.split("\t"), other.split("\t")
            assert rest == rest2
            moves.add((int(user2) - int(user), int(movie2) - int(movie)))
    ((users, movies),) = moves
    assert 1 <= users <= 999 and 1 <= movies <= 999


def test_a_model_that_counts_hits_source_and_control_alike() -> None:
    questions = [q for q in memorisation_questions(ROWS, RECIPE, 1) if q.task == "next rating"]

    def counted(q: Question) -> str:
        fields = q.prompt.strip().split("\n")[-1].split("\t")
        return "\t".join([fields[0], str(int(fields[1]) + 1), *fields[2:]])

    table = memorisation_table(
        questions, [counted(q) for q in questions], confidence=0.95, checkpoint_version="v"
    )
    asked = table[(table["match"] == "movie_id") & (table["answered_by"] == "model")]
    hits = asked.set_index("condition")["hits"].to_dict()
    assert hits["source"] == hits["control"] >= 4  # one film in twelve starts anew


def test_a_title_that_stands_in_the_rows_shown_is_not_asked_for() -> None:
    """Copying would hit it."""
    twins = [[str(i), "Film, The (1990)" if i % 2 else f"Film {i} (1990)"] for i in range(1, 30)]
    rows = SourceRows(twins, ROWS.ratings, "::", "\t")
    for q in (q for q in memorisation_questions(rows, RECIPE, 1) if q.task != "next rating"):
        assert q.answer not in q.prompt


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_no_more_questions_than_rows_and_the_same_ones_for_a_seed(seed: int) -> None:
    many = ProbeRecipe(n=500, context_rows=3, shots=2)
    questions = memorisation_questions(ROWS, many, seed)
    assert questions == memorisation_questions(ROWS, many, seed)
    counts = Counter((q.task, q.condition) for q in questions)
    assert counts == {
        (task, condition): n
        for task, n in (("next title", 9), ("title of id", 12), ("next rating", 27))
        for condition in ("source", "control")
    }


TITLE = Question("title of id", "source", "1::", "Net, The (1995)", "", "::")
RATING = Question("next rating", "source", "", "3\t17\t4\t900", "", "\t")


@pytest.mark.parametrize(
    ("text", "exact", "normalised"),
    [
        ("Net, The (1995)::Thriller\n2::", True, True),
        ("Net, The (1995)", True, True),
        ("The Net (1996)\n", False, True),
        ("net", False, True),
        ("Internet (1995)", False, False),
        ("\nNet, The (1995)", False, False),
        ("", False, False),
    ],
)
def test_what_counts_as_a_title(text: str, exact: bool, normalised: bool) -> None:
    assert matches(TITLE, text) == {"exact": exact, "normalised": normalised}


@pytest.mark.parametrize(
    ("text", "row", "movie_id", "rating"),
    [
        ("3\t17\t4\t900\n4\t1", True, True, True),
        ("3\t17\t4\t901", False, True, True),
        ("3\t1\t4\t900", False, False, True),
        ("3\t17", False, True, False),
        ("17 4", False, False, False),
    ],
)
def test_what_counts_as_a_rating(text: str, row: bool, movie_id: bool, rating: bool) -> None:
    assert matches(RATING, text) == {"row": row, "movie_id": movie_id, "rating": rating}


def test_a_model_that_knows_the_source_hits_all_there_and_the_control_tells() -> None:
    """Planted memory: it answers every question as the source would, control included."""
    questions = memorisation_questions(ROWS, RECIPE, seed=1)
    title_of = {row[0]: row[1] for row in ROWS.movies}
    texts = [
        q.answer if q.task == "next rating" else title_of[q.prompt.split("\n")[-1][:-2]]
        for q in questions
    ]
    table = memorisation_table(questions, texts, confidence=0.95, checkpoint_version="v")
    model = table[(table["answered_by"] == "model") & (table["match"] == "exact")]
    hits = model.set_index(["task", "condition"])["hits"].to_dict()
    for task in ("next title", "title of id"):
        same = [
            a.answer == b.answer
            for a, b in zip(of(task, "source"), of(task, "control"), strict=True)
        ]
        assert (hits[task, "source"], hits[task, "control"]) == (5, sum(same))
    all_hit = model[model["hits"] == 5].iloc[0]
    assert all_hit["low"] == pytest.approx(0.025 ** (1 / 5)) and all_hit["high"] == 1


def test_the_baseline_of_ratings_is_the_most_frequent_film_and_rating() -> None:
    ratings = [["1", "7", "4", str(i)] for i in range(20)] + [["2", "8", "5", "99"]]
    rows = SourceRows(ROWS.movies, ratings, "::", "\t")
    questions = of("next rating", "source", rows)
    assert {q.guess.split("\t")[1:3] == ["7", "4"] for q in questions} == {True}
    table = memorisation_table(
        questions, ["" for _ in questions], confidence=0.95, checkpoint_version="v"
    )
    rating = table[table["match"] == "rating"].set_index("answered_by")["hits"].to_dict()
    assert rating["model"] == 0 and rating["baseline"] >= 4


def test_the_table_holds_no_text_of_the_source() -> None:
    questions = memorisation_questions(ROWS, RECIPE, seed=1)
    table = memorisation_table(
        questions, [q.answer for q in questions], confidence=0.95, checkpoint_version="v"
    )
    cells = " ".join(map(str, table.to_numpy().ravel()))
    assert not any(row[1] in cells for row in ROWS.movies)
    assert isinstance(table, pd.DataFrame)


@pytest.mark.parametrize("dataset", ["ml-100k", "ml-1m"])
def test_the_rows_are_the_files_own(real_data, dataset: str) -> None:
    rows = read_source_rows(real_data(dataset), dataset)
    film, rating = rows.separator.join(rows.movies[0]), rows.ratings_separator.join(rows.ratings[0])
    start = {"ml-100k": ("1|Toy Story (1995)|", "196\t242\t3\t"), "ml-1m": ("1::Toy Story", "1::")}
    assert film.startswith(start[dataset][0]) and rating.startswith(start[dataset][1])
    assert {len(row) for row in rows.ratings} == {4}
