"""Each function against autograd on the plain formula; a whole model against the libraries'."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from llmrec_assets.models import fast_layers as fast
from llmrec_assets.models.unpadded import positions, rows_of


def _same(ours, plain, *inputs: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Values and gradients of ``ours`` are those of ``plain``, for a gradient that varies."""
    found = []
    for function in (ours, plain):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = function(*leaves)
        y.backward(torch.linspace(-1, 2, y.numel()).view_as(y))
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_lora_is_the_sum_of_both_products() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 7)
    _same(
        lambda x, a, b: fast._Lora.apply(x, weight, a, b, 0.5),
        lambda x, a, b: x @ weight.T + 0.5 * (x @ a.T) @ b.T,
        torch.randn(6, 7),
        torch.randn(3, 7),
        torch.randn(5, 3),
    )


def test_for_the_compiler_the_same_is_written() -> None:
    torch.manual_seed(0)
    angles = torch.randn(5, 1, 8)
    some = [torch.randn(5, 3, 8), angles.cos(), angles.sin()]
    dropped = [torch.randn(4, 6), torch.randn(4, 6), torch.rand(4, 6) < 0.5, 2.0]
    for kernel, inputs in ((fast._one_rotated, some), (fast._one_add_dropped, dropped)):
        fused = kernel._fused(*inputs)
        torch.testing.assert_close(fused, kernel._function(*inputs))


def test_dropout_goes_to_the_adapter_alone() -> None:
    torch.manual_seed(0)
    weight = torch.randn(5, 7)

    def dropped(function):
        torch.manual_seed(1)
        return function()

    _same(
        lambda x, a, b: dropped(lambda: fast._Lora.apply(x, weight, a, b, 0.5, 0.3)),
        lambda x, a, b: (
            x @ weight.T
            + 0.5 * (dropped(lambda: torch.native_dropout(x, 0.3, True)[0]) @ a.T) @ b.T
        ),
        torch.randn(6, 7),
        torch.randn(3, 7),
        torch.randn(5, 3),
    )


def test_lora_gradients_are_of_the_adapters_dtype() -> None:
    a, b = torch.randn(3, 7, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    x = torch.randn(6, 7, dtype=torch.bfloat16)
    y = fast._Lora.apply(x, torch.randn(5, 7, dtype=torch.bfloat16), a, b, 0.5)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert a.grad.dtype == b.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_the_libraries(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = LlamaRMSNorm(8, eps=1e-5).to(dtype).requires_grad_(False)
    norm.weight.copy_(torch.linspace(0.5, 2, 8))
    _same(
        lambda x: fast._RmsNorm.apply(x, norm.weight, 1e-5),
        norm,
        (3 * torch.randn(2, 4, 8)).to(dtype),
        tolerance=1e-5 if dtype == torch.float32 else 0.05,
    )


def test_swiglu_is_silu_times_up() -> None:
    torch.manual_seed(0)
    _same(
        fast._SwiGlu.apply,
        lambda gate, up: torch.nn.functional.silu(gate) * up,
        torch.randn(3, 6),
        torch.randn(3, 6),
    )


def test_rotation_is_the_libraries() -> None:
    torch.manual_seed(0)
    angles = torch.randn(5, 4)
    angles = torch.cat([angles, angles], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    _same(
        lambda x: fast._Rotate.apply(x, cos[:, None], sin[:, None]),
        lambda x: apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=1)[0],
        torch.randn(5, 3, 8),
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_attention_is_softmax_of_what_is_seen(key_heads: int, masked: bool) -> None:
    torch.manual_seed(0)
    length = 9
    seen = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    if masked:  # another part of the past in each row, and always itself
        seen &= (torch.rand(2, 1, length, length) < 0.5) | torch.eye(length, dtype=torch.bool)

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(6 // key_heads, dim=1) for x in (k, v))
        scores = 0.3 * q @ k.transpose(2, 3)
        return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v

    _same(
        lambda q, k, v: fast._CausalAttention.apply(q, k, v, 0.3, seen if masked else None),
        plain,
        torch.randn(2, 6, length, 8),
        torch.randn(2, key_heads, length, 8),
        torch.randn(2, key_heads, length, 8),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chosen_log_probs_are_those_of_the_softmax(temperature: float) -> None:
    torch.manual_seed(0)
    targets = torch.tensor([0, 10, 3])
    _same(
        lambda logits: fast.chosen_log_probs(logits, targets, temperature),
        lambda logits: (
            (logits / temperature).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        ),
        20 * torch.randn(3, 11),
    )


def test_logits_are_left_as_they_were() -> None:
    logits = torch.randn(3, 11)
    before = logits.clone()
    fast.chosen_log_probs(logits, torch.tensor([0, 1, 2]), 0.5)
    assert torch.equal(logits, before)


def _model() -> torch.nn.Module:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    model = get_peft_model(
        LlamaForCausalLM(config).eval(),
        LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def _run(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(input_ids=ids, use_cache=False).logits
    logits.square().sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    return logits.detach(), torch.cat(gradients)


def test_a_model_computes_what_it_computed() -> None:
    plain = _model()
    ours = copy.deepcopy(plain)
    fast.speed_up(ours)
    swapped = {type(module).__name__ for module in ours.modules()}
    assert {"FastLoraLinear", "FastRmsNorm", "FastMlp", "FastAttention"} <= swapped
    ids = torch.randint(0, 50, (3, 12))
    for mine, theirs in zip(_run(ours, ids), _run(plain, ids), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [[5, 9, 1], [4, 4]])
def test_rows_without_padding_compute_what_each_computes_alone(lengths: list[int]) -> None:
    plain = _model()
    ours = copy.deepcopy(plain)
    assert fast.speed_up(ours, unpadded=True)
    ids = [torch.randint(0, 50, (1, length)) for length in lengths]
    logits = ours(
        input_ids=torch.cat(ids, dim=1),
        position_ids=positions(lengths)[None],
        rows=rows_of(lengths),
        use_cache=False,
    ).logits
    logits.square().sum().backward()
    gradients = [p.grad.flatten() for p in ours.parameters() if p.requires_grad]
    alone = [_run(plain, row) for row in ids]  # gradients add up
    torch.testing.assert_close(
        logits[0], torch.cat([row[0] for row, _ in alone]), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(torch.cat(gradients), alone[-1][1], rtol=1e-3, atol=1e-3)


def test_rows_without_padding_are_refused_where_they_would_run_together() -> None:
    model = _model()
    fast.speed_up(model, unpadded=True)
    with pytest.raises(ValueError, match="whole rows"):
        model(
            input_ids=torch.tensor([[1, 2, 3]]),
            position_ids=positions([2, 1])[None],
            rows=rows_of([2, 1]),
            use_cache=True,
        )
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    assert not fast.speed_up(gpt2, unpadded=True)


def test_an_attention_of_another_kind_stays() -> None:
    """Eager attention may do what SDPA cannot: cap scores, or sink some."""
    model = _model()
    model.get_base_model().set_attn_implementation("eager")
    assert not fast.speed_up(model, unpadded=True)
    assert model.config._attn_implementation == "eager"


def test_in_bfloat16_only_rounding_tells_them_apart() -> None:
    """Both stay near float32; ours rounds attention's scores once more (twice the error here)."""
    exact = _run(_model(), ids := torch.randint(0, 50, (3, 12)))[1]
    errors = []
    for swap in (False, True):
        model = _model()
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        if swap:
            fast.speed_up(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            gradients = _run(model, ids)[1]
        assert gradients.dtype == torch.float32
        errors.append(float((gradients - exact).norm() / exact.norm()))
    assert errors[1] < 3 * errors[0] < 0.05


def test_another_activation_takes_the_libraries_way() -> None:
    plain = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=1,
            num_attention_heads=6,
            hidden_act="gelu",
        )
    ).eval()
    ours = copy.deepcopy(plain)
    fast.speed_up(ours)
    ids = torch.randint(0, 50, (2, 7))
    torch.testing.assert_close(ours(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_swapped_model_generates_and_switches_adapters_off() -> None:
    plain = _model()
    ours = copy.deepcopy(plain)
    fast.speed_up(ours)
    ids = torch.randint(0, 50, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    for model in (plain, ours):
        model.generation_config.eos_token_id = None
    assert torch.equal(
        ours.generate(input_ids=ids, attention_mask=mask, **options),
        plain.generate(input_ids=ids, attention_mask=mask, **options),
    )
    with ours.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(
            ours(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-5
        )


def test_dropout_takes_the_libraries_way() -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_dropout=0.5, target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False)), config)
    layer = model.base_model.model[0]
    layer.__class__ = fast.FastLoraLinear
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    model.train()
    x = torch.ones(64, 4)
    assert len(model(x).unique(dim=0)) > 1  # masks differ by row
