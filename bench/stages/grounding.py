"""Grounding 100,000 distinct raw titles to ML-1M's catalogue.

The titles are ``bench/grounding``'s: every variant of every kind, then typos. Peers: RapidFuzz'
``process.extractOne`` with WRatio a title (the published rule), and ``process.cdist`` with WRatio
on both cores. Neither refuses, so what is asserted is fewer wrong matches, on the titles all
answered.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from bench.frame import PROJECT, Bench, Comparison, Peer, Row, Timer
from bench.ratings import part_at_hand
from llmrec_assets.ground.grounding import Catalogue, Grounder
from llmrec_assets.ground.movielens import read_movies
from llmrec_assets.ground.recipes import GroundingRecipe

SEED, TITLES = 0, 100_000
#: The peers ground the first so many, and the time is scaled: their time is linear in the titles.
MEASURED = 2_000


def rows(bench: Bench) -> list[Row]:
    comparison = Comparison(
        stage="grounding",
        title="grounding, 100,000 distinct raw titles",
        prepare=prepare,
        small=TITLES // 10,
        full=TITLES,
        ours="ours",
        peers=[
            Peer("rapidfuzz extractOne(WRatio)", "extract_one", goal=20, repeats=3),
            Peer("rapidfuzz cdist(WRatio), both cores", "cdist", goal=3, repeats=3),
        ],
        check=check,
    )
    return [comparison.row(bench)]


def prepare(directory: Path, size: int) -> str:
    source, dataset = part_at_hand(), "ml-1m"
    if source is None:
        source, dataset = PROJECT / "data" / "sample", "sample"
    # a script of its own, with imports of its own
    sys.path.insert(0, str(PROJECT / "bench" / "grounding"))
    from run import Data, distinct_strings

    data = Data(dataset, source, SEED)
    pairs = distinct_strings(data, size, SEED)
    pd.DataFrame(pairs, columns=["text", "movie_id"]).to_parquet(directory / "titles.parquet")
    (directory / "source.json").write_text(json.dumps([dataset, str(source)]))
    return f"{size:,} distinct strings for the {len(data.films):,} films of {dataset}"


def _given(inputs: Path) -> tuple[list[str], pd.DataFrame]:
    dataset, source = json.loads((inputs / "source.json").read_text())
    texts = pd.read_parquet(inputs / "titles.parquet")["text"].tolist()
    return texts, read_movies(Path(source), dataset)


def ours(inputs: Path, out: Path, timer: Timer) -> None:
    texts, movies = _given(inputs)
    with timer():
        matches = Grounder(Catalogue(movies), GroundingRecipe()).ground(texts)
    np.save(out / "found.npy", [match.movie_id or 0 for match in matches])


def extract_one(inputs: Path, out: Path, timer: Timer) -> None:
    from rapidfuzz import fuzz, process

    texts, movies = _given(inputs)
    titles, ids = movies["title"].tolist(), movies["canonical_movie_id"].tolist()
    some = texts[:MEASURED]
    with timer(times=len(texts) / len(some)):
        best = [process.extractOne(text, titles, scorer=fuzz.WRatio) for text in some]
    np.save(out / "found.npy", [ids[one[2]] for one in best])


def cdist(inputs: Path, out: Path, timer: Timer) -> None:
    from rapidfuzz import fuzz, process

    texts, movies = _given(inputs)
    titles, ids = movies["title"].tolist(), movies["canonical_movie_id"].to_numpy()
    some = texts[:MEASURED]
    with timer(times=len(texts) / len(some)):
        scores = process.cdist(some, titles, scorer=fuzz.WRatio, dtype=np.float32, workers=-1)
        best = scores.argmax(axis=1)
    np.save(out / "found.npy", ids[best])


def check(inputs: Path, out: Mapping[str, Path]) -> str:
    """Wrong: another film than the one the text was written for."""
    wanted = pd.read_parquet(inputs / "titles.parquet")["movie_id"].to_numpy()
    found = {name: np.load(path / "found.npy") for name, path in out.items()}
    n = min(map(len, found.values()))
    answers = {name: some[:n] for name, some in found.items()}
    wrong = {
        name: int(((some != wanted[:n]) & (some != 0)).sum()) for name, some in answers.items()
    }
    right = {name: int((some == wanted[:n]).sum()) for name, some in answers.items()}
    mine, *peers = wrong
    assert all(wrong[mine] < wrong[peer] and right[mine] > right[peer] for peer in peers), wrong
    told = "; ".join(f"{name} {wrong[name]:,} wrong, {right[name]:,} right" for name in wrong)
    everywhere = int(((found[mine] != wanted) & (found[mine] != 0)).sum())
    return (
        f"Of the first {n:,}: {told} (the rest refused). Of all {len(wanted):,}: ours "
        f"{everywhere:,} wrong"
    )
