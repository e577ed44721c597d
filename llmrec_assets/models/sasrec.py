"""SASRec: self-attention over a user's films, next liked film as target.

What belongs here: the network, its training and its scores. What does not: which step's weights
are kept (``classical_lists``) and how scores become lists (``classical``).

Kang & McAuley, *Self-Attentive Sequential Recommendation*, ICDM 2018, with the full softmax
cross-entropy of Klenitskiy & Vasilev, *Turning Dross Into Gold Loss: is BERT4Rec really better
than SASRec?*, RecSys 2023: with it SASRec is the strong sequential baseline. An input film carries
its liked mark (a prompt shows it), and only liked films are targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from llmrec_assets.ground.recipes import SasrecRecipe
from llmrec_assets.ground.recommender import Window

_IGNORED = -100


class SasRec(nn.Module):
    """Causal transformer over films; the output layer is the film embedding.

    Films are columns 0 … ``n_films`` - 1; ``n_films`` itself is padding, to the right.
    """

    def __init__(self, n_films: int, recipe: SasrecRecipe) -> None:
        super().__init__()
        size = recipe.embedding_size
        self.film = nn.Embedding(n_films + 1, size, padding_idx=n_films)
        self.mark = nn.Embedding(2, size)
        self.position = nn.Embedding(recipe.max_length, size)
        layer = nn.TransformerEncoderLayer(
            size,
            recipe.heads,
            dim_feedforward=size,
            dropout=recipe.dropout,
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(layer, recipe.blocks, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(recipe.dropout)
        for embedding in (self.film, self.mark, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, films: Tensor, liked: Tensor) -> Tensor:
        """Hidden states (batch, length, size) of film columns and marks (batch, length)."""
        length = films.shape[1]
        hidden = self.film(films) + self.mark(liked) + self.position(torch.arange(length))
        ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
        return self.norm(self.blocks(self.dropout(hidden), mask=ahead))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (…, n_films) of hidden states (…, size)."""
        return hidden @ self.film.weight[:-1].T


class SasRecScorer:
    """Trains a ``SasRec`` in steps; between them it scores.

    Args:
        events: ``training_events``.
        catalogue: canonical ids, one per column of the scores.
        recipe: sizes and training.
        liked_min: rating from which a film is liked, so a target.
        seed: of the weights, the order and the dropout.
    """

    def __init__(
        self,
        events: pd.DataFrame,
        catalogue: Sequence[int],
        recipe: SasrecRecipe,
        liked_min: int,
        seed: int,
    ) -> None:
        self._recipe = recipe
        self._column = {film: position for position, film in enumerate(catalogue)}
        sequences = [
            (
                torch.tensor([self._column[film] for film in rows["film"].tolist()]),
                torch.tensor((rows["rating"] >= liked_min).to_numpy()).long(),
            )
            for _, rows in events.groupby("user_id", sort=True)
        ]
        # without a target a user teaches nothing, and a batch of such users has no loss
        self._sequences = [(films, liked) for films, liked in sequences if liked[1:].any()]
        self._random = np.random.default_rng(seed)
        with _repeatable(seed):
            self._model = SasRec(len(catalogue), recipe)
            self._state = torch.get_rng_state()
        self._optimiser = torch.optim.AdamW(
            self._model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self._batches = self._epochs()

    def train(self, steps: int) -> float:
        """Takes ``steps`` optimiser steps; returns the mean cross-entropy of a target in nats."""
        losses = []
        with _repeatable(self._state):
            self._model.train()
            for _ in range(steps if self._sequences else 0):
                films, liked, target = next(self._batches)
                wanted = target != _IGNORED
                logits = self._model.logits(self._model(films, liked)[wanted])
                loss = functional.cross_entropy(logits, target[wanted])
                self._optimiser.zero_grad()
                loss.backward()
                self._optimiser.step()
                losses.append(loss.item())
            self._state = torch.get_rng_state()
        return float(np.mean(losses)) if losses else float("nan")

    def scores(self, windows: Sequence[Window]) -> NDArray[np.float32]:
        """(windows, films): logits after the window's last ``max_length`` films; NaN where it
        shows none."""
        n_films, length = len(self._column), self._recipe.max_length
        scores = np.full((len(windows), n_films), np.nan, dtype=np.float32)
        with _repeatable(self._state), torch.inference_mode():
            self._model.eval()
            for row, window in enumerate(windows):
                # one by one: no padding, so that a window's neighbours cannot move its scores
                known = [
                    (self._column[film], like)
                    for film, like in zip(window.films, window.liked, strict=True)
                    if film in self._column
                ][-length:]
                if known:
                    films, liked = torch.tensor(known).T
                    hidden = self._model(films[None], liked[None])[0, -1]
                    scores[row] = self._model.logits(hidden).numpy()
        return scores

    def _epochs(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches for ever: each epoch cuts every user's films anew, from a random offset."""
        size = self._recipe.batch_size
        while True:
            chunks = [chunk for sequence in self._sequences for chunk in self._cut(*sequence)]
            order = self._random.permutation(len(chunks))
            for start in range(0, len(order), size):
                batch = [chunks[i] for i in order[start : start + size]]
                if any((target != _IGNORED).any() for _, _, target in batch):
                    yield self._padded(batch)

    def _cut(self, films: Tensor, liked: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        length = self._recipe.max_length
        targets = torch.where(liked[1:] == 1, films[1:], _IGNORED)
        first = int(self._random.integers(1, length + 1))
        edges = [0, *range(first, len(targets), length), len(targets)]
        for start, end in pairwise(edges):
            if end > start:
                yield films[start:end], liked[start:end], targets[start:end]

    def _padded(
        self, batch: Sequence[tuple[Tensor, Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        padding = (len(self._column), 0, _IGNORED)
        films, liked, target = (
            nn.utils.rnn.pad_sequence(list(part), batch_first=True, padding_value=value)
            for part, value in zip(zip(*batch, strict=True), padding, strict=True)
        )
        return films, liked, target


@contextmanager
def _repeatable(start: int | Tensor) -> Iterator[None]:
    """One thread and a random state of its own: the same bits on every run of a machine, and no
    trace in the process's global state."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        if isinstance(start, int):
            torch.manual_seed(start)
        else:
            torch.set_rng_state(start)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
