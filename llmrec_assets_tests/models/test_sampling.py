"""The token loop: the right distribution, noise by name, the prompt once."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from llmrec_assets.ground.errors import ModelError
from llmrec_assets.ground.recipes import BaseModelRecipe
from llmrec_assets.models.base import prepare_base_model
from llmrec_assets.models.loading import load_policy
from llmrec_assets.models.prefill import prefill
from llmrec_assets.models.sampling import (
    Decoding,
    Sample,
    _drawn,
    next_tokens,
    sample_tokens,
    stream,
    uniforms,
)

TINY = BaseModelRecipe(source="tiny", name="tiny", dtype="float32", label="tiny", seed=4)
NO_STOP = Decoding(max_new_tokens=12)
#: Every fourth token ends an answer, so that rows end all the time.
STOPS = range(0, 1024, 4)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    return prepare_base_model(TINY, tmp_path_factory.mktemp("base") / "files")[0]


@pytest.fixture
def model(base_dir):
    return load_policy(base_dir, [], dtype=torch.float32, device=torch.device("cpu"))[0]


def _prompts(n: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, 300, size=3 + 5 * (i % 4)).tolist() for i in range(n)]


def _streams(n: int, each: int) -> list[list[int]]:
    return [[stream(7, "test", i, sample) for sample in range(each)] for i in range(n)]


def _sample(model, prompts, streams, decoding=NO_STOP, stops=()):
    return sample_tokens(model, prompts, streams, decoding, stops=stops, pad=2)


def _flat(samples: list[list[Sample]]) -> list[Sample]:
    return [sample for answers in samples for sample in answers]


def _noise(n: int, position: int = 0) -> np.ndarray:
    return uniforms(np.array([stream(1, i) for i in range(n)], dtype=np.uint64), position)


def _frequencies(logits: list[float], n: int = 20_000, **values) -> np.ndarray:
    decoding = Decoding(max_new_tokens=1, **values)
    tokens = next_tokens(torch.tensor(logits).expand(n, -1), decoding, _noise(n))
    return np.bincount(tokens.numpy(), minlength=len(logits)) / n


def _softmax(logits: list[float]) -> np.ndarray:
    weights = np.exp(np.array(logits) - max(logits))
    return weights / weights.sum()


def _chi_square(found: np.ndarray, expected: np.ndarray, n: int = 20_000) -> float:
    assert not found[expected == 0].any()
    kept = expected > 0
    return float(n * ((found - expected)[kept] ** 2 / expected[kept]).sum())


def test_a_stream_is_known_by_its_name_on_every_machine() -> None:
    # blake2b with 8 bytes of [0, "sample", 1, 2], big end first
    assert stream(0, "sample", 1, 2) == 1221433692595547946
    assert stream(0, 1) != stream(0, "1")
    assert stream(0, 1, 23) != stream(0, 12, 3)
    assert stream(0, np.int32(5)) == stream(0, 5)


def test_uniforms_are_splitmix64s() -> None:
    """The published outputs of SplitMix64 seeded with 1234567, shifted to 52 bits."""
    keys = np.array([1234567], dtype=np.uint64)
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [uniforms(keys, t)[0] for t in range(3)] == [(z >> 12) / 2**52 for z in published]


def test_uniforms_fill_the_interval_and_positions_are_unrelated() -> None:
    first, second = _noise(20_000, 0), _noise(20_000, 1)
    assert first.min() >= 0 and first.max() < 1
    assert _chi_square(np.bincount((first * 10).astype(int)) / 20_000, np.full(10, 0.1)) < 27.9
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.03


# chi-square's 0.999 quantiles for 5, 2 and 3 degrees of freedom: 20.5, 13.8, 16.3
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_from_softmax_of_logits_over_temperature(temperature: float) -> None:
    logits = [0.0, 1.5, -2.0, 0.3, 3.0, -0.5]
    expected = _softmax([value / temperature for value in logits])
    assert _chi_square(_frequencies(logits, temperature=temperature), expected) < 20.5


def test_top_k_keeps_the_k_likeliest_in_proportion() -> None:
    logits = [0.0, 1.5, -2.0, 0.3, 3.0, -0.5]
    expected = np.zeros(6)
    expected[[1, 3, 4]] = _softmax([1.5, 0.3, 3.0])
    assert _chi_square(_frequencies(logits, top_k=3), expected) < 13.8


def test_top_p_keeps_the_fewest_that_reach_p_in_proportion() -> None:
    shares = [0.1, 0.4, 0.05, 0.25, 0.2]
    logits = np.log(shares).tolist()
    # 0.4 + 0.25 < 0.7 <= 0.4 + 0.25 + 0.2
    expected = np.array([0, 0.4, 0, 0.25, 0.2]) / 0.85
    assert _chi_square(_frequencies(logits, top_p=0.7), expected) < 13.8
    assert _frequencies(logits, top_p=0.01)[1] == 1
    # top_k first: of 0.4 and 0.25, renormalised, 0.4 / 0.65 reaches 0.6 alone
    assert _frequencies(logits, top_k=2, top_p=0.6)[1] == 1


def test_the_extremes_of_the_noise_draw_the_first_and_last_possible_token() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 1.0, 2.0, float("-inf")]]).expand(2, -1)
    noise = np.array([0.0, 1 - 2.0**-52])
    assert next_tokens(logits, NO_STOP, noise).tolist() == [1, 3]


@pytest.mark.parametrize("vocabulary", [7, 512, 1300])
def test_sections_draw_what_one_sum_over_the_vocabulary_draws(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    weights = torch.rand(200, vocabulary, generator=generator) ** 8
    weights[torch.rand(weights.shape, generator=generator) < 0.4] = 0  # as top_k leaves them
    weights[:, 3] += 1e-3
    noise = torch.rand(200, generator=generator, dtype=torch.float64)
    noise[0], noise[1] = 0, 1 - 2**-52
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    target = noise[:, None] * cumulative[:, -1:]
    expected = torch.searchsorted(cumulative, target, right=True)[:, 0]
    drawn = _drawn(weights, noise)
    assert torch.equal(drawn, expected)
    assert (weights.gather(1, drawn[:, None]) > 0).all()


def test_sampled_first_tokens_follow_the_models_own_softmax(model) -> None:
    prompt, n = _prompts(1)[0], 8000
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1] / 0.7
    expected = logits.double().softmax(-1).numpy()
    decoding = Decoding(max_new_tokens=1, temperature=0.7)
    (samples,) = _sample(model, [prompt], _streams(1, n), decoding)
    found = np.bincount([s.tokens[0] for s in samples], minlength=len(expected)) / n
    top = expected.argsort()[::-1][:20]
    binned = [np.append(share[top], 1 - share[top].sum()) for share in (found, expected)]
    assert _chi_square(binned[0], binned[1], n) < 45.3  # 20 degrees of freedom, 0.999


@pytest.mark.parametrize("decoding", [NO_STOP, Decoding(12, top_k=40, top_p=0.8, temperature=1.3)])
def test_neither_batch_nor_order_nor_number_changes_a_sample(model, decoding: Decoding) -> None:
    prompts, streams = _prompts(8), _streams(8, 3)
    alone = [
        [_sample(model, [prompt], [[key]], decoding, STOPS)[0][0] for key in keys]
        for prompt, keys in zip(prompts, streams, strict=True)
    ]
    assert len({tuple(sample.tokens) for samples in alone for sample in samples}) > 12
    for size in (1, 3, 8):
        batched = []
        for start in range(0, 8, size):
            some = slice(start, start + size)
            batched += _sample(model, prompts[some], streams[some], decoding, STOPS)
        assert batched == alone
    backwards = _sample(model, prompts[::-1], streams[::-1], decoding, STOPS)
    assert backwards[::-1] == alone
    # Another number for each prompt; as many rows as prompts, yet not one each.
    uneven = [keys[: i % 3] for i, keys in enumerate(streams)]
    assert _sample(model, prompts, uneven, decoding, STOPS) == [
        samples[: i % 3] for i, samples in enumerate(alone)
    ]
    swapped = [streams[0][:2], []]
    assert _sample(model, prompts[:2], swapped, decoding, STOPS) == [alone[0][:2], []]


def test_no_stream_gives_no_sample(model) -> None:
    assert _sample(model, [], []) == []
    assert _sample(model, _prompts(2), [[], []]) == [[], []]


def test_an_answer_is_the_unstopped_one_up_to_its_first_stop(model) -> None:
    """Rows that end are dropped from the batch; the others must not notice."""
    prompts, streams = _prompts(6), _streams(6, 5)
    long = Decoding(max_new_tokens=50)  # past the cache's room
    whole = _sample(model, prompts, streams, long)
    ended = _sample(model, prompts, streams, long, STOPS)
    lengths = set()
    for expected, found in zip(_flat(whole), _flat(ended), strict=True):
        assert len(expected.tokens) == 50 and expected.stop is None
        stops = [i for i, token in enumerate(expected.tokens) if token in STOPS]
        end = stops[0] if stops else 50
        assert found.tokens == expected.tokens[:end]
        assert found.stop == (expected.tokens[end] if stops else None)
        lengths.add(len(found.tokens))
    assert len(lengths) > 5


def test_the_prompt_is_computed_once_and_ended_rows_are_not_computed(model) -> None:
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    prompts, streams = _prompts(4), _streams(4, 5)
    samples = _sample(model, prompts, streams, Decoding(max_new_tokens=40), STOPS)
    assert shapes[0] == (4, 18)
    assert {columns for _, columns in shapes[1:]} == {1}
    steps = [len(s.tokens) + (s.stop is not None) for s in _flat(samples)]
    assert len(shapes) == max(steps)
    for step, (rows, _) in enumerate(shapes[1:], start=1):
        live = sum(n > step for n in steps)
        assert live <= rows < max(4 * live / 3, live + 1), "at most a quarter has ended"


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_greedy_equals_generate(model, temperature: float) -> None:
    prompts = _prompts(4)
    width = max(map(len, prompts))
    expected = model.generate(
        input_ids=torch.tensor([[2] * (width - len(p)) + p for p in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
        do_sample=False,
        max_new_tokens=40,
        min_new_tokens=40,
        pad_token_id=2,
    )[:, width:]
    greedy = Decoding(max_new_tokens=40, do_sample=False, temperature=temperature)
    found = _sample(model, prompts, _streams(4, 2), greedy)
    assert [[s.tokens for s in samples] for samples in found] == [
        [row, row] for row in expected.tolist()
    ]


def test_an_adapter_samples_as_its_merged_weights_and_can_be_off(model) -> None:
    prompts, streams = _prompts(3), _streams(3, 4)
    plain = _sample(model, prompts, streams)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).eval()
    torch.manual_seed(0)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapted = _sample(wrapped, prompts, streams)
    assert adapted != plain
    with wrapped.disable_adapter():
        assert _sample(wrapped, prompts, streams) == plain
    assert _sample(wrapped.merge_and_unload(), prompts, streams) == adapted


def test_bfloat16_samples_are_the_same_from_call_to_call(model) -> None:
    model.to(torch.bfloat16)
    prompts, streams = _prompts(3), _streams(3, 4)
    assert _sample(model, prompts, streams) == _sample(model, prompts, streams)


def test_training_mode_is_refused(model) -> None:
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        _sample(model.train(), _prompts(1), _streams(1, 1))


def test_logits_that_are_not_numbers_say_so(model) -> None:
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(ModelError, match="not numbers"):
        _sample(model, _prompts(1), _streams(1, 1))


@pytest.mark.parametrize("each", [1, 3])
def test_computed_prompts_give_the_same_samples_and_stay_as_they_are(model, each: int) -> None:
    """Longer than the room of a cache, with rows that end and with several samples a prompt."""
    prompts, streams = _prompts(5), _streams(5, each)
    long = Decoding(max_new_tokens=80)
    expected = _sample(model, prompts, streams, long, STOPS)
    computed = prefill(model, prompts, pad=2)
    held = [(layer.keys.clone(), layer.values.clone()) for layer in computed._layers]
    logits, mask = computed.logits.clone(), computed.mask.clone()
    for stops in (STOPS, (), STOPS):
        found = sample_tokens(model, prompts, streams, long, stops=stops, pad=2, prefilled=computed)
        assert (found == expected) == (len(stops) > 0)
        for layer, (keys, values) in zip(computed._layers, held, strict=True):
            assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        assert torch.equal(computed.logits, logits) and torch.equal(computed.mask, mask)


def test_prompts_that_were_not_computed_are_refused(model) -> None:
    prompts, streams = _prompts(2), _streams(2, 1)
    computed = prefill(model, prompts, pad=2)
    for others in (prompts[:1], [prompts[0], prompts[1][:-1]]):
        with pytest.raises(ValueError, match="not the prompts"):
            sample_tokens(
                model, others, streams[: len(others)], NO_STOP, stops=(), pad=2, prefilled=computed
            )
