"""A packed output layer computes what torch's does, and knows when it may not."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from llmrec_assets.models.packed import PackedLinear, pack

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN"
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=97, num_attention_heads=4, num_key_value_heads=2, **shape)
    return LlamaForCausalLM(config).eval()


def logits(model, rows=3):
    ids = torch.arange(rows * 5).reshape(rows, 5) % 97
    with torch.inference_mode():
        return model(input_ids=ids).logits


def packed_layers(model):
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def test_a_packed_model_says_the_same(model):
    plain = logits(model)
    pack(model)
    assert packed_layers(model) == [model.lm_head]
    torch.testing.assert_close(logits(model), plain, atol=1e-6, rtol=1e-5)


def test_packing_twice_is_packing_once(model):
    pack(model)
    once = logits(model)
    pack(model)
    assert torch.equal(logits(model), once)


def test_adapters_are_still_added_and_merged(model):
    torch.manual_seed(1)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    plain = logits(tuned)
    pack(tuned)
    assert len(packed_layers(tuned)) == 1
    torch.testing.assert_close(logits(tuned), plain, atol=1e-4, rtol=1e-4)
    with tuned.disable_adapter():
        assert not torch.allclose(logits(tuned), plain, atol=1e-2)
    torch.testing.assert_close(logits(tuned.merge_and_unload()), plain, atol=1e-4, rtol=1e-4)


def test_an_output_layer_with_an_adapter_stays_as_it_is(model):
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"]))
    pack(tuned)
    assert not packed_layers(tuned)


def written(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(2)


def loaded(model):
    model.load_state_dict({name: 2 * w for name, w in model.state_dict().items()})


def replaced(model):
    model.lm_head.weight = torch.nn.Parameter(2 * model.lm_head.weight.detach())


def converted(model):
    model.bfloat16().float()


@pytest.mark.parametrize("change", [written, loaded, replaced, converted])
def test_what_happens_to_the_weight_afterwards_counts(model, change):
    plain = copy.deepcopy(model)
    pack(model)
    for one in (model, plain):
        change(one)
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-6, rtol=1e-5)


def test_gradients_flow_as_before(model):
    pack(model)
    loss = model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_autocast_and_bfloat16_are_left_to_torch(model):
    pack(model)
    x = torch.ones(2, 32)
    layer = model.lm_head
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    narrow = model.to(torch.bfloat16)
    assert logits(narrow).dtype == torch.bfloat16
    fresh = LlamaForCausalLM(model.config).to(torch.bfloat16)
    pack(fresh)
    assert not packed_layers(fresh)


def test_a_row_does_not_depend_on_its_neighbours():
    torch.manual_seed(2)
    layer = torch.nn.Linear(576, 1536, bias=True)
    plain = copy.deepcopy(layer)
    layer.__class__ = PackedLinear
    layer.pack()
    x = torch.randn(40, 576)
    with torch.inference_mode():
        together, alone = layer(x), torch.cat([layer(x[i : i + 1]) for i in range(len(x))])
        torch.testing.assert_close(together, plain(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-6)
        assert layer(x[:0]).shape == (0, 1536)
