"""On a GPU trainings and samples are what they are on a CPU, up to rounding. Skipped elsewhere.

Run it where there is one: ``pytest llmrec_assets_tests/models/test_on_gpu.py``.
"""

from pathlib import Path

import pytest
import torch
from ppo_cases import PROMPTS, TINY, Scripted, random_reward_model
from test_dpo import PAIRS, make_sft_adapter
from test_dpo import PROMPTS as PAIR_PROMPTS
from test_fast_layers import _model, _run
from test_ppo import RECIPE as PPO

from llmrec_assets.ground.recipes import (
    DpoRecipe,
    EvaluationRecipe,
    LoraRecipe,
    RewardRecipe,
    SftRecipe,
)
from llmrec_assets.models import fast_layers as fast
from llmrec_assets.models.base import prepare_base_model
from llmrec_assets.models.chat import prompt_ids, stop_ids
from llmrec_assets.models.device import Device, pick_device
from llmrec_assets.models.dpo import train_dpo_on_pairs
from llmrec_assets.models.loading import load_policy, precision
from llmrec_assets.models.ppo import train_ppo
from llmrec_assets.models.reward import score_responses, train_reward_on_pairs
from llmrec_assets.models.sampling import Decoding, sample_tokens, stream
from llmrec_assets.models.sft import train_sft

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CPU = Device("cpu", "CPU", "cpu")


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMREC_DEVICE", "cuda")  # tests run on the CPU by default


@pytest.fixture(scope="module")
def dirs(tmp_path_factory) -> tuple[Path, Path]:
    base = prepare_base_model(TINY, tmp_path_factory.mktemp("base") / "files")[0]
    return base, make_sft_adapter(base, tmp_path_factory.mktemp("sft") / "adapter")


def _both(train, tmp_path: Path) -> tuple[tuple[Path, dict], tuple[Path, dict]]:
    return tuple(train(device, tmp_path / device.type) for device in (CPU, pick_device()))


def _settings(**changes) -> dict:
    return {
        "lora": LoraRecipe(r=4, alpha=8),
        "learning_rate": 1e-3,
        "batch_size": 4,
        "micro_batch_size": 2,
        "epochs": 2,
        "save_steps": 2,
        "dtype": "float32",
    } | changes


def _alike(curves, tolerance: float = 2e-3) -> None:
    mine, theirs = ([value for _, value in curve] for curve in curves)
    assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft(dirs, tmp_path: Path, checkpointing: bool) -> None:
    prompts = [f"User {'x' * (i % 5)}{i} liked film {i % 5}. Recommend." for i in range(24)]
    completions = [f'["Film {i % 5} (19{80 + i % 5})"]' for i in range(24)]
    recipe = SftRecipe(**_settings(gradient_checkpointing=checkpointing))

    def train(device: Device, work: Path):
        return train_sft(
            dirs[0], prompts, completions, recipe, seed=5, work_dir=work, device=device
        )

    cpu, gpu = _both(train, tmp_path)
    _alike([gpu.losses, cpu.losses])
    assert gpu.peak_memory_gb < 1  # of the card


def test_dropout_on_a_gpu_is_the_libraries(dirs, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(64, 32, device="cuda", requires_grad=r) for r in (True, False))
    a, b = (torch.randn(n, m, device="cuda", requires_grad=True) for n, m in ((4, 32), (64, 4)))
    found = []
    for ours in (True, False):
        torch.manual_seed(1)
        if ours:
            y = fast._Lora.apply(x, weight, a, b, 0.5, 0.3)
        else:
            y = x @ weight.T + 0.5 * (torch.nn.functional.dropout(x, 0.3) @ a.T) @ b.T
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), (x, a, b))])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


def test_a_model_computes_what_it_computed() -> None:
    ids = torch.randint(0, 50, (3, 12))
    exact = _run(_model(), ids)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.03)):
        model = _model()
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        model.cuda()
        fast.speed_up(model)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = _run(model, ids.cuda())
        for mine, theirs in zip(found, exact, strict=True):
            assert (mine.cpu() - theirs).norm() < tolerance * theirs.norm()
    assert fast._one_rotated._fused is not None, "torch.compile does not work here"


def test_dpo(dirs, tmp_path: Path) -> None:
    def train(device: Device, work: Path):
        recipe = DpoRecipe(**_settings())
        return train_dpo_on_pairs(
            *dirs, PAIR_PROMPTS, PAIRS, recipe, seed=5, work_dir=work, device=device
        )

    (_, cpu), (_, gpu) = _both(train, tmp_path)
    _alike([gpu["curves"]["losses"], cpu["curves"]["losses"]])
    assert gpu["validation"]["loss"] == pytest.approx(cpu["validation"]["loss"], rel=2e-3)


def test_reward_model(dirs, tmp_path: Path) -> None:
    def train(device: Device, work: Path):
        return train_reward_on_pairs(
            *dirs,
            PAIR_PROMPTS,
            PAIRS,
            RewardRecipe(**_settings()),
            EvaluationRecipe(resamples=100),
            seed=5,
            work_dir=work,
            device=device,
        )

    (_, cpu), (reward, gpu) = _both(train, tmp_path)
    _alike([gpu["curves"]["losses"], cpu["curves"]["losses"]])
    scores = [
        score_responses(
            *dirs,
            reward,
            ["Recommend."] * 3,
            ["a", "b b", "c c c"],
            max_length=512,
            dtype=torch.float32,
            device=device,
        )
        for device in (CPU, pick_device())
    ]
    torch.testing.assert_close(*map(torch.tensor, scores), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reward", ["ndcg", "model"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ppo(dirs, tmp_path: Path, reward: str, dtype: str) -> None:
    recipe = PPO.model_copy(update={"reward": reward, "batches": 2, "dtype": dtype})
    reward_dir = random_reward_model(dirs[0], dirs[1], tmp_path / "reward")

    def train(device: Device, work: Path):
        return train_ppo(
            *dirs,
            PROMPTS,
            recipe,
            reward_dir=reward_dir,
            scorer=Scripted(lambda text: float("3" in text)),
            seed=5,
            work_dir=work,
            device=device,
        )

    (_, cpu), (_, gpu) = _both(train, tmp_path)
    assert gpu["steps"] == cpu["steps"]
    if dtype == "float32":
        for name in ("reward", "policy_loss", "value_loss", "entropy"):
            _alike([gpu["curves"][name][:1], cpu["curves"][name][:1]], 5e-3)


def test_greedy_answers(dirs) -> None:
    found = []
    for device in (CPU, pick_device()):
        model, tokenizer = load_policy(dirs[0], dirs[1:], dtype=torch.float32, device=device.torch)
        prompts = [prompt_ids(tokenizer, f"User {'x' * i} liked film {i}.") for i in range(4)]
        with precision(model):
            found.append(
                sample_tokens(
                    model,
                    prompts,
                    [[stream(1, i)] for i in range(4)],
                    Decoding(24, do_sample=False),
                    stops=stop_ids(tokenizer, model),
                    pad=0,
                )
            )
    assert found[0] == found[1]
