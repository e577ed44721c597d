"""The catalogue as token tries: every title as it stands in a list, one trie per place in the list.

What belongs here: titles and a tokenizer in, tries out, with the proof that their tokens are the
ones a completion has. What does not: walking them (``constrained``, ``ranked``).

A title's tokens depend on its place. Tokenizers merge quotes and commas with the letters beside
them (SmolLM2: ``)",`` is one token between two titles, ``)`` and ``"]`` are two at the end), and a
model has learnt the merged ones only. So the tries are cut out of whole tokenized completions, at
the borders between an item's comma and the next item's quote, and never put together from parts:
an item is ``["Title",`` first, ``"Title",`` in the middle and ``"Title"]`` with the end of turn
last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from llmrec_assets.ground.completions import render_completion
from llmrec_assets.ground.errors import ModelError
from llmrec_assets.models.chat import TEMPLATE_VARIABLES, completion_ids, render_prompt

#: Characters behind an item's closing quote at which one item ends and the next begins, tried in
#: turn: after the comma (byte-level BPE: the space opens the next token), or after the space.
_BORDERS = (1, 2)
_PLACEHOLDER = "q"


@dataclass(frozen=True)
class Trie:
    """Token paths of items; a leaf is one title.

    Nodes are numbered from the root, 0; the children of node n are ``child[start[n]:start[n+1]]``
    by the tokens ``token[start[n]:start[n+1]]``, ascending. Leaves are ordered by their paths, so
    that those under node n are ``low[n]:high[n]``, and ``leaves`` gives each leaf's title.
    """

    start: np.ndarray  # int64 [nodes + 1]
    token: np.ndarray  # int64 [edges]
    child: np.ndarray  # int64 [edges]
    low: np.ndarray  # int64 [nodes]
    high: np.ndarray  # int64 [nodes]
    leaves: np.ndarray  # int64 [titles]
    depth: int  # tokens of the longest path

    def is_leaf(self, node: np.ndarray | int) -> np.ndarray:
        """Whether nodes have no children."""
        return self.start[np.asarray(node) + 1] == self.start[node]

    def title(self, leaf: int) -> int:
        """Which title a leaf node is."""
        return int(self.leaves[self.low[leaf]])

    def room(self, open_titles: np.ndarray) -> np.ndarray:
        """Running counts of open leaves, [titles + 1]: ``room[high[n]] - room[low[n]]`` is how many
        lie under node n.

        Args:
            open_titles: bool [titles], by title.
        """
        return np.concatenate([[0], np.cumsum(open_titles[self.leaves])])


@dataclass(frozen=True)
class CatalogueTries:
    """Titles, the film each one means, and their tries by place in a list of ``k``.

    ``films``: canonical movie id by title; a film may have several titles.
    """

    titles: tuple[str, ...]
    films: np.ndarray  # int64 [titles]
    k: int
    first: Trie
    middle: Trie | None  # None: k < 3
    last: Trie | None  # None: k is 1, and ``first`` ends the list

    def at(self, rank: int) -> Trie:
        """The trie of the item at ``rank`` (0-based)."""
        trie = self.first
        if rank:
            trie = self.last if rank == self.k - 1 else self.middle  # type: ignore[assignment]
        return trie

    @cached_property
    def max_tokens(self) -> int:
        """No list of k titles has more tokens, its end included."""
        return sum(self.at(rank).depth for rank in range(self.k))

    def open_titles(
        self, seen: frozenset[int], candidates: frozenset[int] | None = None
    ) -> np.ndarray:
        """Titles that may stand in a list, bool [titles]: of films not seen and, where candidates
        are given, among them.

        Args:
            seen: canonical movie ids.
            candidates: canonical movie ids; None: the whole catalogue.
        """
        open_titles = ~np.isin(self.films, np.fromiter(seen, np.int64, len(seen)))
        if candidates is not None:
            wanted = np.fromiter(candidates, np.int64, len(candidates))
            open_titles &= np.isin(self.films, wanted)
        return open_titles


def catalogue_tries(tokenizer: Any, movies: pd.DataFrame, k: int) -> CatalogueTries:
    """The tries of a catalogue for lists of ``k`` titles.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        movies: ``MOVIES``.

    Raises:
        ModelError: the catalogue has fewer than k titles, or a title's tokens depend on the titles
            beside it, so that no trie holds what the model was trained on.
    """
    film_of: dict[str, int] = {}
    for title, film in zip(
        movies["title"].str.strip().tolist(), movies["canonical_movie_id"].tolist(), strict=True
    ):
        if film_of.setdefault(title, film) != film:
            raise ModelError(
                f"title trie: {title!r} means the films {film_of[title]} and {film}; materialize "
                "movies again, so that one title is one film"
            )
    titles = list(film_of)
    if len(titles) < k:
        raise ModelError(f"title trie: the catalogue has {len(titles)} titles, lists need {k}")
    items = _items(tokenizer, titles, k)
    tries = [_trie([path for path, _ in place], titles) for place in items]
    return CatalogueTries(
        titles=tuple(titles),
        films=np.array(list(film_of.values()), dtype=np.int64),
        k=k,
        first=tries[0],
        middle=tries[1] if k > 2 else None,
        last=tries[-1] if k > 1 else None,
    )


def _items(
    tokenizer: Any, titles: Sequence[str], k: int
) -> list[list[tuple[tuple[int, ...], str]]]:
    """Per place (first, middle, last; fewer where k < 3) each title's tokens there, with the list
    they were found in. Every title is read at every rank, beside other titles each time."""
    before, after = _around(tokenizer)
    lists = [[titles[(i + j) % len(titles)] for j in range(k)] for i in range(len(titles))]
    texts = [before + render_completion(items) + after for items in lists]
    try:
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError as error:
        raise ModelError(
            "title trie: the tokenizer gives no offsets; use its fast version (tokenizer.json)"
        ) from error
    _require_as_trained(tokenizer, lists[0], encoded["input_ids"][0])
    place_of = [0] + [1] * (k - 2) + [min(k, 3) - 1] * (k > 1)
    problem = ""
    for cut in _BORDERS:
        places: list[dict[int, tuple[tuple[int, ...], str]]] = [{} for _ in range(min(k, 3))]
        problem = ""
        for row, items in enumerate(lists):
            cuts, position = [], len(before) + 1
            for item in items[:-1]:
                position += len(render_completion([item])) - 2  # with its quotes
                cuts.append(position + cut)
                position += len(", ")
            parts = _split(encoded["input_ids"][row], encoded["offset_mapping"][row], cuts)
            if parts is None:
                problem = problem or f"a token of {texts[row]!r} reaches over the border of an item"
                continue
            for rank, part in enumerate(parts):
                title = (row + rank) % len(titles)
                known = places[place_of[rank]].setdefault(title, (part, texts[row]))
                if known[0] != part:
                    problem = problem or (
                        f"{titles[title]!r} has other tokens in {texts[row]!r} than in {known[1]!r}"
                    )
        if not problem:
            return [[place[title] for title in range(len(titles))] for place in places]
    raise ModelError(
        f"title trie: {problem}; this tokenizer's lists cannot be cut into titles, so only the "
        "decoding `free` can be used with it"
    )


def _split(
    ids: Sequence[int], offsets: Sequence[tuple[int, int]], cuts: Sequence[int]
) -> list[tuple[int, ...]] | None:
    """The tokens between the cuts (character offsets); None where a token reaches over one."""
    parts: list[list[int]] = [[] for _ in range(len(cuts) + 1)]
    part = 0
    for token, (begin, end) in zip(ids, offsets, strict=True):
        while part < len(cuts) and begin >= cuts[part]:
            part += 1
        if part < len(cuts) and end > cuts[part]:
            return None
        parts[part].append(token)
    return [tuple(part) for part in parts]


def _around(tokenizer: Any) -> tuple[str, str]:
    """What the chat template puts before and after an answer, up to the end of the turn."""
    start = render_prompt(tokenizer, _PLACEHOLDER)
    answer = render_completion([_PLACEHOLDER])
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": _PLACEHOLDER}, {"role": "assistant", "content": answer}],
        tokenize=False,
        **TEMPLATE_VARIABLES,
    )
    before, found, after = whole[len(start) :].rstrip("\n").partition(answer)
    if not found:
        raise ModelError("title trie: the chat template changes an answer that is a JSON list")
    return before, after


def _require_as_trained(tokenizer: Any, items: list[str], ids: list[int]) -> None:
    trained = completion_ids(tokenizer, _PLACEHOLDER, render_completion(items))
    if trained != ids:
        raise ModelError(
            f"title trie: {render_completion(items)!r} is tokenized otherwise by SFT "
            "(chat.completion_ids) than here; the chat template depends on the answer"
        )


def _trie(paths: Sequence[tuple[int, ...]], titles: Sequence[str]) -> Trie:
    order = sorted(range(len(paths)), key=paths.__getitem__)
    start, token, child, low, high = [0], [], [], [0], [len(order)]
    depths = [0]
    node = 0
    while node < len(low):  # breadth first: a node's children are numbered together
        depth, position, end = depths[node], low[node], high[node]
        if end - position > 1 or depth < len(paths[order[position]]):
            while position < end:
                path = paths[order[position]]
                if depth == len(path):
                    other = titles[order[position + 1]]
                    raise ModelError(
                        f"title trie: the tokens of {titles[order[position]]!r} begin those of "
                        f"{other!r}, so a list could not tell them apart"
                    )
                upto = position + 1
                while upto < end and paths[order[upto]][depth : depth + 1] == path[depth:][:1]:
                    upto += 1
                token.append(path[depth])
                child.append(len(low))
                low.append(position)
                high.append(upto)
                depths.append(depth + 1)
                position = upto
        start.append(len(token))
        node += 1
    return Trie(
        start=np.array(start, dtype=np.int64),
        token=np.array(token, dtype=np.int64),
        child=np.array(child, dtype=np.int64),
        low=np.array(low, dtype=np.int64),
        high=np.array(high, dtype=np.int64),
        leaves=np.array(order, dtype=np.int64),
        depth=max(map(len, paths)),
    )
