"""A catalogue that wants to break tries and lists, a model for it, and prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

from llmrec_assets.ground.completions import render_completion
from llmrec_assets.models.tiny import tiny_llama, tiny_tokenizer

TITLES = [
    "Alien",
    "Alien (1979)",
    "Alien³ (1992)",
    "Aliens (1986)",
    "Fly, The (1986)",
    "Fly Away Home (1996)",
    "Fl",
    'He said "no" (1990)',
    '"',
    '", "',
    'Alien", "Heat',
    'A\\"',
    "\\",
    "]",
    '"]',
    "Schindler's List (1993)",
    "'Til There Was You (1997)",
    "...And Justice for All (1979)",
    "$50K, [and] {Change}",
    "Net, The (1995)",
    "Café d'été (1991)",
    "七人の侍 (1954)",
    "1-900 (1994)",
    "Heat (1995)",
    "He",
]
#: "Heat" and "He" are one film under two names.
FILMS = [*range(1, len(TITLES)), len(TITLES) - 1]


def movies(titles: list[str] = TITLES, films: list[int] | None = None) -> pd.DataFrame:
    ids = list(range(1, len(titles) + 1)) if films is None else films
    return pd.DataFrame({"title": titles, "canonical_movie_id": ids})


def catalogue() -> pd.DataFrame:
    return movies(TITLES, FILMS)


def tokenizer(merging: bool = True) -> Any:
    """``merging``: trained on whole lists, so that quotes, commas and brackets merge."""
    texts = [render_completion(TITLES[i:] + TITLES[:i]) for i in range(len(TITLES))]
    return tiny_tokenizer(texts if merging else TITLES, vocab_size=420)


def model(tok: Any) -> Any:
    return tiny_llama(tok, seed=3).eval()


def prompts(n: int) -> list[list[int]]:
    generator = np.random.default_rng(5)
    return [generator.integers(3, 250, size=3 + i % 6).tolist() for i in range(n)]


def padded(asked: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    width = max(map(len, asked))
    return {
        "input_ids": torch.tensor([[pad] * (width - len(p)) + p for p in asked]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in asked]),
    }
