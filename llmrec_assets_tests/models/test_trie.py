"""Title tries: the tokens of a list are those a completion is trained with, at every place."""

from __future__ import annotations

import catalogue_cases as cases
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmrec_assets.ground.completions import render_completion
from llmrec_assets.ground.errors import ModelError
from llmrec_assets.models.chat import completion_ids
from llmrec_assets.models.trie import CatalogueTries, Trie, catalogue_tries


def _paths(trie: Trie) -> dict[int, list[int]]:
    """Title → its tokens, by walking the whole trie."""
    paths, going = {}, [(0, [])]
    while going:
        node, path = going.pop()
        if trie.is_leaf(node):
            paths[trie.title(node)] = path
        for edge in range(trie.start[node], trie.start[node + 1]):
            going.append((int(trie.child[edge]), [*path, int(trie.token[edge])]))
    return paths


@pytest.fixture(scope="module", params=[True, False], ids=["merging", "plain"])
def tokenizer(request):
    return cases.tokenizer(request.param)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_any_list_is_the_items_of_its_tries_one_after_another(tokenizer, k: int) -> None:
    tries = catalogue_tries(tokenizer, cases.catalogue(), k)
    paths = [_paths(tries.at(rank)) for rank in range(k)]
    assert all(set(found) == set(range(len(cases.TITLES))) for found in paths)

    @settings(max_examples=60, deadline=None)
    @given(st.permutations(range(len(cases.TITLES))))
    def check(order: list[int]) -> None:
        chosen = order[:k]
        tokens = [t for rank, title in enumerate(chosen) for t in paths[rank][title]]
        text = render_completion([cases.TITLES[title] for title in chosen])
        assert tokens == completion_ids(tokenizer, "who?", text)
        assert len(tokens) <= tries.max_tokens

    check()


def test_quotes_commas_and_brackets_do_merge_in_these_tests() -> None:
    """Otherwise the test above would say little."""
    merged = cases.tokenizer().convert_ids_to_tokens(
        completion_ids(cases.tokenizer(), "q", render_completion(["Heat (1995)", "Alien (1979)"]))
    )
    assert {'["', ')",'} <= set(merged) and '"]' in "".join(merged)


def test_room_counts_open_titles_under_a_node(tokenizer) -> None:
    trie = catalogue_tries(tokenizer, cases.catalogue(), 5).first
    open_titles = np.zeros(len(cases.TITLES), dtype=bool)
    open_titles[[1, 3]] = True  # Alien (1979), Aliens (1986)
    room = trie.room(open_titles)
    for node in range(len(trie.low)):
        under = set(trie.leaves[trie.low[node] : trie.high[node]].tolist())
        assert room[trie.high[node]] - room[trie.low[node]] == len(under & {1, 3})


def test_open_titles_close_every_title_of_a_seen_film_and_what_no_one_put_forward() -> None:
    tries = catalogue_tries(cases.tokenizer(), cases.catalogue(), 5)

    def closed(*arguments) -> set[str]:
        return {
            t for t, o in zip(tries.titles, tries.open_titles(*arguments), strict=True) if not o
        }

    assert closed(frozenset()) == set()
    assert closed(frozenset({24, 99})) == {"Heat (1995)", "He"}
    assert closed(frozenset({1}), frozenset({1, 2, 24})) == set(cases.TITLES) - {
        "Alien (1979)",
        "Heat (1995)",
        "He",
    }


def test_a_title_under_two_ids_is_one_title(tokenizer) -> None:
    tries = catalogue_tries(tokenizer, cases.movies(["A", "B", "A"], [1, 2, 1]), 2)
    assert tries.titles == ("A", "B") and tries.films.tolist() == [1, 2]
    with pytest.raises(ModelError, match="'A' means the films 1 and 3"):
        catalogue_tries(tokenizer, cases.movies(["A", "B", "A"]), 2)


def test_a_catalogue_smaller_than_the_list_is_refused(tokenizer) -> None:
    with pytest.raises(ModelError, match="has 2 titles, lists need 3"):
        catalogue_tries(tokenizer, cases.movies(["A", "B"]), 3)


def _trained(pre_tokenizer, decoder, texts: list[str]) -> PreTrainedTokenizerFast:
    """A BPE tokenizer that splits as told before merging, all it can merge merged."""
    tok = Tokenizer(models.BPE(unk_token=None))
    if pre_tokenizer is not None:
        tok.pre_tokenizer = pre_tokenizer
    tok.decoder = decoder
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False
    )
    tok.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = cases.tokenizer().chat_template
    return fast


def _texts(titles: list[str]) -> list[str]:
    lists = [render_completion([a, b]) for a in titles for b in titles if a != b]
    return [*lists, "user\nq assistant\na"]


def _walks(tries: CatalogueTries, tok, chosen: list[int]) -> bool:
    tokens = [t for rank, title in enumerate(chosen) for t in _paths(tries.at(rank))[title]]
    return tokens == completion_ids(
        tok, "q", render_completion([tries.titles[title] for title in chosen])
    )


def test_a_tokenizer_that_opens_words_with_a_metaspace_can_be_used() -> None:
    titles = ["Heat", "Fly, The", "Alien"]
    tok = _trained(pre_tokenizers.Metaspace(), decoders.Metaspace(), _texts(titles))
    assert _walks(catalogue_tries(tok, cases.movies(titles), 3), tok, [2, 0, 1])


def test_a_tokenizer_that_keeps_the_space_with_the_comma_can_be_used() -> None:
    titles = ["Heat", "Alien", "Fargo"]
    split = pre_tokenizers.Split(", ", "merged_with_previous")
    tok = _trained(split, decoders.Fuse(), _texts(titles))
    assert tok.tokenize('"Heat", "Alien"') != tok.tokenize('"Heat",') + tok.tokenize(' "Alien"')
    assert _walks(catalogue_tries(tok, cases.movies(titles), 3), tok, [2, 0, 1])


def test_a_tokenizer_that_merges_across_titles_is_refused_by_the_title() -> None:
    titles = ["Heat", "Alien", "Fargo"]
    tok = _trained(None, decoders.Fuse(), _texts(titles))
    with pytest.raises(ModelError, match=r"Heat.*border of an item.*only the decoding `free`"):
        catalogue_tries(tok, cases.movies(titles), 3)


def test_a_template_that_rewrites_the_answer_is_refused(tokenizer) -> None:
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = template.replace(
            "message['content'] }}", "message['content'] | replace('[', '(') }}"
        )
        with pytest.raises(ModelError, match="chat template changes an answer"):
            catalogue_tries(tokenizer, cases.catalogue(), 5)
    finally:
        tokenizer.chat_template = template
