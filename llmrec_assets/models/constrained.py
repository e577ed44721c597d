"""The decoding ``constrained``: a list of exactly k distinct, unseen titles of the catalogue.

What belongs here: where a list stands in the tries, which tokens may follow, and the two forms in
which a loop asks for them: ``CatalogueConstraint`` for ``sampling.sample_tokens``,
``CatalogueLogitsProcessor`` for transformers' ``generate``. What does not: the tries (``trie``),
ranking titles (``ranked``), and which films a user has seen (``ground.recommendations``).

Masking the next token, the model draws from its own distribution renormalised over what may
follow, token by token: titles that begin alike share the probability of their beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import LogitsProcessor

from llmrec_assets.ground.errors import ModelError
from llmrec_assets.models.trie import CatalogueTries


@dataclass(frozen=True)
class ListState:
    """A list under way. ``rank`` titles are complete; ``rank == k``: the list has ended."""

    name: str
    rank: int
    node: int  # of the trie at ``rank``
    open_titles: np.ndarray  # bool [titles]
    room: np.ndarray  # ``Trie.room`` of them, in the trie at ``rank``


class ListGrammar:
    """Lists of ``tries.k`` titles as states and tokens."""

    def __init__(self, tries: CatalogueTries) -> None:
        self._tries = tries
        last = tries.at(tries.k - 1)
        ends = {int(t) for t in last.token[last.is_leaf(last.child)]}
        if len(ends) != 1:
            raise ModelError(
                f"title trie: lists end in {len(ends)} different tokens; the chat template needs "
                "one token that ends a turn"
            )
        self._ended = np.array(sorted(ends), dtype=np.int64)

    def start(self, name: str, open_titles: np.ndarray) -> ListState:
        """An empty list.

        Args:
            name: whose list it is, for errors.
            open_titles: titles that may stand in it, bool [titles]
                (``CatalogueTries.open_titles``).

        Raises:
            ModelError: they are of fewer than k films.
        """
        require_films(self._tries, name, open_titles)
        return ListState(name, 0, 0, open_titles, self._tries.at(0).room(open_titles))

    def allowed(self, state: ListState) -> np.ndarray:
        """Token ids that may follow, ascending; never none. After the end: the end's own token."""
        if state.rank == self._tries.k:
            return self._ended
        trie = self._tries.at(state.rank)
        edges = slice(trie.start[state.node], trie.start[state.node + 1])
        child = trie.child[edges]
        allowed = trie.token[edges][state.room[trie.high[child]] > state.room[trie.low[child]]]
        if not len(allowed):
            raise ModelError(
                f"{state.name}: no title may stand at rank {state.rank + 1} of the list; this is "
                "a fault of the decoding, not of the data"
            )
        return allowed

    def advance(self, state: ListState, token: int) -> ListState:
        """The state after ``token``.

        Raises:
            ModelError: the token is not among those allowed.
        """
        if state.rank == self._tries.k:
            return state
        trie = self._tries.at(state.rank)
        first, last = trie.start[state.node], trie.start[state.node + 1]
        edge = first + np.searchsorted(trie.token[first:last], token)
        node = int(trie.child[edge]) if edge < last and trie.token[edge] == token else None
        if node is None or state.room[trie.high[node]] == state.room[trie.low[node]]:
            raise ModelError(
                f"{state.name}: token {token} may not follow at rank {state.rank + 1} of the list"
            )
        if not trie.is_leaf(node):
            return replace(state, node=node)
        rank = state.rank + 1
        films = self._tries.films
        open_titles = state.open_titles & (films != films[trie.title(node)])
        room = self._tries.at(rank).room(open_titles) if rank < self._tries.k else state.room
        return ListState(state.name, rank, 0, open_titles, room)

    def mask(self, logits: torch.Tensor, states: Sequence[ListState]) -> torch.Tensor:
        """``logits`` [n, vocabulary] with -inf for every token that may not follow."""
        allowed = [self.allowed(state) for state in states]
        rows = np.repeat(np.arange(len(states)), [len(tokens) for tokens in allowed])
        index = (
            torch.from_numpy(rows).to(logits.device),
            torch.from_numpy(np.concatenate(allowed)).to(logits.device),
        )
        masked = torch.full_like(logits, float("-inf"))
        masked[index] = logits[index]
        return masked


def require_films(tries: CatalogueTries, name: str, open_titles: np.ndarray) -> None:
    """Refuses a row that cannot be given a list: never is text made without a constraint.

    Raises:
        ModelError: fewer than k films are open.
    """
    n_films = len(np.unique(tries.films[open_titles]))
    if n_films < tries.k:
        raise ModelError(
            f"{name}: {n_films} films of the catalogue are unseen and allowed, a list needs "
            f"{tries.k}; give more candidates, or leave this window out"
        )


class CatalogueConstraint:
    """The constraint on rows of ``sample_tokens``, one list a row."""

    def __init__(self, grammar: ListGrammar, starts: Sequence[ListState]) -> None:
        self._grammar = grammar
        self._states = list(starts)

    def mask(self, logits: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        return self._grammar.mask(logits, [self._states[row] for row in rows])

    def advance(self, row: int, token: int) -> None:
        self._states[row] = self._grammar.advance(self._states[row], token)


class CatalogueLogitsProcessor(LogitsProcessor):
    """The same for one call of transformers' ``generate``: greedy, sampled, with beams or with
    ``num_return_sequences``.

    A row's state follows from its own tokens, since beams change places. ``max_new_tokens`` must be
    at least ``CatalogueTries.max_tokens``. Where beams outnumber what may follow, ``generate``
    fills the others with forbidden tokens at probability zero; they stay at zero.
    """

    def __init__(self, grammar: ListGrammar, starts: Sequence[ListState]) -> None:
        """``starts``: one per prompt, in the order of the prompts."""
        self._grammar = grammar
        self._starts = list(starts)
        self._prompt_length: int | None = None
        self._states: dict[tuple[int, tuple[int, ...]], ListState | None] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._prompt_length is None:
            self._prompt_length = input_ids.shape[1]
        if len(input_ids) % len(self._starts):
            raise ModelError(
                f"constrained decoding: {len(input_ids)} rows for {len(self._starts)} prompts; "
                "make one CatalogueLogitsProcessor for each call of generate"
            )
        each = len(input_ids) // len(self._starts)
        written = input_ids[:, self._prompt_length :].tolist()
        states: dict[tuple[int, tuple[int, ...]], ListState | None] = {}
        rows = []
        for row, tokens in enumerate(written):
            key = (row // each, tuple(tokens))
            if key not in states:
                states[key] = self._state(*key)
            rows.append(states[key])
        self._states = states  # the next tokens continue these
        kept = [row for row, state in enumerate(rows) if state is not None]
        masked = torch.full_like(scores, float("-inf"))
        # Impossible beams go on with some token: the first one, at -inf like all others.
        masked[kept] = self._grammar.mask(scores[kept], [s for s in rows if s is not None])
        return masked

    def _state(self, prompt: int, tokens: tuple[int, ...]) -> ListState | None:
        if not tokens:
            return self._starts[prompt]
        before = (prompt, tokens[:-1])
        state = self._states[before] if before in self._states else self._state(*before)
        if state is None:
            return None
        try:
            return self._grammar.advance(state, tokens[-1])
        except ModelError:
            return None
