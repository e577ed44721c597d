"""The decoding ``ranked``: the k most probable unseen titles are the list.

What belongs here: a beam search over the trie of first titles, for a batch of prompts. What does
not: the trie (``trie``), lists written token by token (``constrained``).

A title's score is log P(title | prompt): the sum over its tokens, opening and closing quote
included, of the model's own log-probabilities, not renormalised over what the trie allows. Whole
titles are compared, so long and short ones compete as answers do; renormalised step by step, a
title would gain from standing alone behind a beginning that the model finds unlikely (the bias of
local normalisation: Lafferty, McCallum and Pereira, 2001, §2).

The prompt is computed once. A prompt's hypotheses do not copy its cache: they are further positions
of its own row, and a mask lets each see the prompt and its own ancestors (tree attention, Miao et
al., 2023, SpecInfer, §4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmrec_assets.ground.errors import ModelError
from llmrec_assets.models.constrained import require_films
from llmrec_assets.models.prefill import CACHE, Prefill, prefill
from llmrec_assets.models.trie import CatalogueTries, Trie


@dataclass(frozen=True)
class Ranking:
    """Titles by their index in ``CatalogueTries.titles``, best first, and their log-probabilities;
    ``n_tokens``: how many tokens of titles the model read to find them."""

    titles: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    n_tokens: int


@torch.inference_mode()
def rank_titles(
    model: Any,
    prompts: Sequence[Sequence[int]],
    names: Sequence[str],
    open_titles: Sequence[np.ndarray],
    tries: CatalogueTries,
    *,
    beams: int,
    pad: int,
    renormalised: bool = False,
    prefilled: Prefill | None = None,
) -> list[Ranking]:
    """The k most probable open titles of each prompt, of distinct films.

    Each step keeps the ``beams`` best beginnings; those that k complete titles already beat are
    dropped, since no title is more probable than its beginning. With at least as many beams as
    open titles the result is exact.

    Args:
        model: a causal language model of the Llama family in eval mode, with or without peft.
        prompts: token ids, none empty.
        names: whose prompts they are, for errors.
        open_titles: per prompt the titles that may be ranked, bool [titles].
        beams: at least k.
        pad: any token id; what it says is masked.
        renormalised: compare by log-probabilities renormalised over what the trie allows; for the
            comparison of the two only.
        prefilled: these prompts, where another decoding has computed them.

    Raises:
        ValueError: the model is in training mode, or there are fewer beams than k.
        ModelError: a prompt has fewer than k films to choose from, or logits are not numbers.
    """
    if model.training:
        raise ValueError("rank_titles needs the model in eval mode: call model.eval() first")
    if beams < tries.k:
        raise ValueError(f"{beams} beams cannot give lists of {tries.k} titles")
    for name, open_ in zip(names, open_titles, strict=True):
        require_films(tries, name, open_)
    if not prompts:
        return []
    searches = [_Search(tries, open_, beams) for open_ in open_titles]
    begun = prefilled or prefill(model, prompts, pad)
    cache, logits = begun.cache_for(prompts), begun.logits[:, None]
    mask = begun.mask.bool().cpu().numpy()
    del begun  # unless the caller keeps them, the prompts' own cache goes as this one grows
    lengths, width = mask.sum(axis=1), mask.shape[1]

    live = list(range(len(prompts)))  # the prompt of each row of the batch
    visible = np.zeros((len(live), 1, 0), dtype=bool)  # which tree positions a hypothesis sees
    depth = 0
    while live:
        _score([searches[i] for i in live], logits, names, renormalised)
        if not any(searches[i].nodes.size for i in live):
            break
        going = [row for row, i in enumerate(live) if searches[i].nodes.size]
        # Ended prompts cost as much as others; dropping them copies the cache.
        if 4 * (len(live) - len(going)) >= len(live):
            cache.batch_select_indices(torch.tensor(going, device=model.device))
            live, visible = [live[row] for row in going], visible[going]
        new = max(searches[i].nodes.size for i in live)
        fed = np.full((len(live), new), pad, dtype=np.int64)
        past = visible.shape[2]
        sees = np.zeros((len(live), new, past + new), dtype=bool)
        sees[:, np.arange(new), past + np.arange(new)] = True  # itself
        for row, i in enumerate(live):
            size = searches[i].nodes.size
            fed[row, :size] = searches[i].tokens
            sees[row, :size, :past] = visible[row][searches[i].parents]
        visible = sees
        prompt_mask = np.broadcast_to(mask[live][:, None], (len(live), new, width))
        positions = np.broadcast_to((lengths[live] + depth)[:, None], fed.shape)
        logits = model(
            input_ids=torch.from_numpy(fed).to(model.device),
            attention_mask=_attention(model, np.concatenate([prompt_mask, visible], axis=2)),
            position_ids=torch.from_numpy(positions.copy()).to(model.device),
            **{CACHE: cache},
            use_cache=True,
        ).logits
        depth += 1
    return [search.ranking(name) for search, name in zip(searches, names, strict=True)]


def _attention(model: Any, sees: np.ndarray) -> torch.Tensor:
    """A mask [rows, 1, new, all] that says, for each new position, what it sees."""
    mask = torch.from_numpy(sees).to(model.device)[:, None]
    if model.config._attn_implementation == "eager":  # it adds the mask
        least = torch.finfo(model.dtype).min
        return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(
            ~mask, least
        )
    return mask


def _score(
    searches: Sequence[_Search], logits: torch.Tensor, names: Sequence[str], renormalised: bool
) -> None:
    """Hands each search the log-probabilities of its next tokens.

    Args:
        logits: [rows, hypotheses, vocabulary] of the tokens read last.
    """
    asked = [search.expand() for search in searches]
    rows = np.concatenate(
        [parents + row * logits.shape[1] for row, (parents, _) in enumerate(asked)]
    )
    tokens = np.concatenate([t for _, t in asked])
    flat = logits.reshape(-1, logits.shape[-1])
    found = flat[
        torch.from_numpy(rows).to(flat.device), torch.from_numpy(tokens).to(flat.device)
    ].double()
    if renormalised:
        values = found.cpu().numpy()
        total = np.full(len(flat), -np.inf)
        np.logaddexp.at(total, rows, values)
        log_probabilities = values - total[rows]
    else:
        total_of = flat.float().logsumexp(dim=-1).double()
        log_probabilities = (found - total_of[torch.from_numpy(rows).to(flat.device)]).cpu().numpy()
    if np.isnan(log_probabilities).any():
        raise ModelError(
            "the model's logits are not numbers (NaN or infinite), so no title can be ranked: its "
            "weights are damaged or its training diverged; train it again with a lower learning "
            "rate"
        )
    borders = np.cumsum([len(parents) for parents, _ in asked])[:-1]
    for search, values in zip(searches, np.split(log_probabilities, borders), strict=True):
        search.keep(values)


class _Search:
    """One prompt's hypotheses: ``nodes`` of the trie, the ``tokens`` that led there, their
    ``scores``, and whose continuation each is (``parents``, among the hypotheses before)."""

    def __init__(self, tries: CatalogueTries, open_titles: np.ndarray, beams: int) -> None:
        self._tries = tries
        self._trie: Trie = tries.first
        self._room = self._trie.room(open_titles)
        self._beams = beams
        self._found: dict[int, tuple[float, int]] = {}  # film: its best (score, title)
        self._n_tokens = 0
        self._edges = self._from = np.empty(0, dtype=np.int64)
        self.nodes = np.zeros(1, dtype=np.int64)
        self.scores = np.zeros(1)
        self.tokens = self.parents = np.empty(0, dtype=np.int64)

    def expand(self) -> tuple[np.ndarray, np.ndarray]:
        """(hypothesis, token) of every continuation that leads to an open title."""
        trie = self._trie
        start, counts = trie.start[self.nodes], trie.start[self.nodes + 1] - trie.start[self.nodes]
        parents = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(parents)) - np.repeat(np.cumsum(counts) - counts, counts)
        edges = start[parents] + within
        child = trie.child[edges]
        kept = self._room[trie.high[child]] > self._room[trie.low[child]]
        self._edges, self._from = edges[kept], parents[kept]
        return self._from, trie.token[self._edges]

    def keep(self, log_probabilities: np.ndarray) -> None:
        """Takes the log-probabilities of ``expand``'s tokens; puts complete titles aside and keeps
        the best beginnings."""
        trie = self._trie
        child = trie.child[self._edges]
        scores = self.scores[self._from] + log_probabilities
        leaf = trie.is_leaf(child)
        for node, score in zip(child[leaf].tolist(), scores[leaf].tolist(), strict=True):
            title = trie.title(node)
            film = int(self._tries.films[title])
            if film not in self._found or score > self._found[film][0]:
                self._found[film] = (score, title)
        bound = self._best()[-1][0] if len(self._found) >= self._tries.k else -np.inf
        going = np.flatnonzero(~leaf & (scores > bound))
        # equal scores in the order of the trie, so that neither batch nor machine decides
        going = going[np.lexsort((trie.low[child[going]], -scores[going]))][: self._beams]
        self.nodes, self.scores = child[going], scores[going]
        self.tokens, self.parents = trie.token[self._edges[going]], self._from[going]
        self._n_tokens += len(going)

    def _best(self) -> list[tuple[float, int]]:
        """The k best complete titles so far."""
        return sorted(self._found.values(), key=lambda f: (-f[0], f[1]))[: self._tries.k]

    def ranking(self, name: str) -> Ranking:
        best = self._best()
        if len(best) < self._tries.k:
            raise ModelError(
                f"{name}: {self._beams} beams ended in titles of {len(best)} films, a list needs "
                f"{self._tries.k}; raise generation.beams"
            )
        scores, titles = zip(*best, strict=True)
        return Ranking(titles, scores, self._n_tokens)
