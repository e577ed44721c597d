"""PPO: that it learns what pays, only that, from the right prompts, and survives a kill."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ppo_cases import (
    CPU,
    LORA,
    PROMPTS,
    TINY,
    N,
    Scripted,
    disturb,
    episodes_of,
    load_model,
    random_reward_model,
)
from safetensors.torch import load_file

from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.recipes import RlhfRecipe, SftRecipe
from llmrec_assets.models.base import prepare_base_model
from llmrec_assets.models.chat import prompt_ids
from llmrec_assets.models.loading import load_policy
from llmrec_assets.models.ppo import (
    accumulate_gradients,
    batch_prompts,
    roll_out,
    take_steps,
    train_ppo,
)
from llmrec_assets.models.ppo_model import PpoModel, token_batch
from llmrec_assets.models.sft import train_sft

SFT = SftRecipe(
    lora=LORA,
    learning_rate=2e-2,
    batch_size=4,
    micro_batch_size=4,
    epochs=20,
    save_steps=1000,
    dtype="float32",
)
RECIPE = RlhfRecipe(
    reward="ndcg",
    lora=LORA,
    learning_rate=2e-3,
    value_learning_rate=5e-3,
    batches=3,
    batch_size=8,
    micro_batch_size=4,
    epochs_per_batch=2,
    max_new_tokens=20,
    kl_target=10.0,
    kl_stop=1e6,
    missing_end_penalty=0.0,
    dtype="float32",
)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory) -> Path:
    return prepare_base_model(TINY, tmp_path_factory.mktemp("base") / "files")[0]


@pytest.fixture(scope="module")
def sft(base_dir: Path, tmp_path_factory) -> Path:
    """Writes lists of one film, about one in five each."""
    prompts, completions = PROMPTS["prompt"].tolist(), PROMPTS["completion"].tolist()
    work = tmp_path_factory.mktemp("sft")
    return train_sft(
        base_dir, prompts, completions, SFT, seed=1, work_dir=work, device=CPU
    ).adapter_dir


@pytest.fixture(scope="module")
def reward_dir(base_dir: Path, sft: Path, tmp_path_factory) -> Path:
    return random_reward_model(base_dir, sft, tmp_path_factory.mktemp("reward") / "adapter")


def _train(base_dir, sft, work, worth=lambda text: float("3" in text), progress=None, **changes):
    options = {"scorer": Scripted(worth), "reward_dir": None, "prompts": PROMPTS}
    options |= {name: changes.pop(name) for name in list(changes) if name in options}
    return train_ppo(
        base_dir,
        sft,
        options["prompts"],
        RECIPE.model_copy(update=changes),
        reward_dir=options["reward_dir"],
        scorer=options["scorer"],
        seed=5,
        work_dir=work,
        device=CPU,
        progress=progress or (lambda event: None),
    )


def _curve(facts, name: str) -> list[float]:
    return [value for _, value in facts["curves"][name]]


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


# -- forward passes ---------------------------------------------------------------------------


def test_padding_changes_nothing_and_the_reference_is_the_sft_policy(
    base_dir: Path, sft: Path
) -> None:
    """Padded together = each response alone, from the libraries' own logits."""
    model, tokenizer = load_model(base_dir, sft, temperature=0.7)
    disturb(model.policy_parameters())
    disturb(model.value_parameters())
    episodes = episodes_of(tokenizer)
    asked, answered = [e.prompt.tokens for e in episodes], [e.response for e in episodes]
    batch = token_batch(asked, answered, 40, CPU.torch)
    log_p, entropies = model.log_probs_and_entropies(batch)
    with torch.no_grad():
        assert torch.equal(model.log_probs(batch), log_p)
        values = model.values(batch)
    reference = model.reference_log_probs(batch)
    own, _ = load_policy(base_dir, [sft], dtype=torch.float32, device=CPU.torch)
    for row, (prompt, response) in enumerate(zip(asked, answered, strict=True)):
        ids = torch.tensor([prompt + response])
        at = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        n = len(response)
        model.peft.set_adapter("policy")
        for found, language_model in ((log_p, model.peft), (reference, own)):
            with torch.no_grad():
                everything = (language_model(input_ids=ids).logits[0, at] / 0.7).log_softmax(-1)
            expected = everything.gather(-1, torch.tensor(response)[:, None])[:, 0]
            assert torch.allclose(found[row, :n], expected, atol=1e-5)
            if found is log_p:
                entropy = torch.distributions.Categorical(logits=everything).entropy()
                assert torch.allclose(entropies[row, :n], entropy, atol=1e-5)
        alone = token_batch([prompt], [response], n, CPU.torch)
        with torch.no_grad():
            assert torch.allclose(model.values(alone)[0], values[row, :n], atol=1e-5)
            # the state a token is chosen in, not the one before
            model.peft.set_adapter("value")
            states = model.peft(input_ids=ids, output_hidden_states=True).hidden_states[-1]
            expected = model.value_head(states[0, at].float())[:, 0]
            assert torch.allclose(values[row, :n], expected, atol=1e-5)
        for padded in (log_p, entropies, values, reference):
            assert (padded[row, n:] == 0).all()
    assert (log_p - reference).abs().max() > 0.01, "the policy is not the reference any more"


def test_a_fresh_policy_is_the_reference_exactly_and_the_first_value_is_zero(
    base_dir: Path, sft: Path
) -> None:
    model, tokenizer = load_model(base_dir, sft)
    episodes = episodes_of(tokenizer)
    batch = token_batch(
        [e.prompt.tokens for e in episodes], [e.response for e in episodes], 40, CPU.torch
    )
    with torch.no_grad():
        assert torch.equal(model.log_probs(batch), model.reference_log_probs(batch))
        assert (model.values(batch) == 0).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_do_not_change_the_gradient(
    base_dir: Path, sft: Path, checkpointing: bool
) -> None:
    """One by one, by twos or all at once; with activations recomputed or kept."""
    gradients = []
    for size in (4, 1, 2):
        model, tokenizer = load_model(
            base_dir, sft, gradient_checkpointing=checkpointing and size == 2
        )
        recipe = RECIPE.model_copy(update={"micro_batch_size": size})
        earned = [[(0, 1.0)], [(0, -1.0)], [(2, 0.5)], [(1, 0.25)]]
        rollout, _ = roll_out(model, episodes_of(tokenizer), earned, recipe, first=True)
        disturb(model.policy_parameters())
        disturb(model.value_parameters())
        accumulate_gradients(model, rollout, range(len(rollout.parts)), recipe)
        parameters = model.policy_parameters() | model.value_parameters()
        assert all(p.grad is not None for p in parameters.values())
        gradients.append({name: p.grad for name, p in parameters.items()})
        frozen = [p.grad for n, p in model.peft.named_parameters() if "lora" not in n]
        assert frozen and all(grad is None for grad in frozen)
    for other in gradients[1:]:
        for name, whole in gradients[0].items():
            assert torch.allclose(other[name], whole, rtol=1e-3, atol=1e-6), name


def test_bfloat16_starts_with_a_ratio_of_exactly_one(base_dir: Path, sft: Path) -> None:
    base, tokenizer = load_policy(base_dir, [sft], dtype=torch.bfloat16, device=CPU.torch)
    model = PpoModel(base, LORA, temperature=0.9)
    disturb(model.policy_parameters())
    episodes = episodes_of(tokenizer)
    rollout, _ = roll_out(model, episodes, [[(0, 1.0)]] * 4, RECIPE, first=True)
    found = accumulate_gradients(model, rollout, range(len(rollout.parts)), RECIPE)
    assert found["approx_kl"] == 0
    assert found["clip_fraction"] == 0
    assert all(p.dtype == torch.float32 for p in model.policy_parameters().values())


# -- rewards ----------------------------------------------------------------------------------


def test_rewards_stand_where_they_belong(base_dir: Path, sft: Path) -> None:
    """The end token is an action; a cut response pays the penalty at its last token."""
    model, tokenizer = load_model(base_dir, sft)
    recipe = RECIPE.model_copy(update={"missing_end_penalty": 2.0, "gae_lambda": 1.0})
    episodes = episodes_of(tokenizer)[:2]
    assert episodes[0].response[-1] == tokenizer.eos_token_id
    assert episodes[1].response[-1] != tokenizer.eos_token_id
    lengths = [len(e.response) for e in episodes]
    earned = [[(1, 0.5), (lengths[0] - 1, 1.0)], [(lengths[1] - 1, 1.0)]]
    rollout, curves = roll_out(model, episodes, earned, recipe, first=True)
    assert rollout.mask.sum(dim=1).tolist() == lengths
    # γ = λ = 1 and no KL yet: returns are rewards to go
    first = [1.5] * 2 + [1.0] * (lengths[0] - 2)
    assert rollout.returns[0, : lengths[0]].tolist() == pytest.approx(first)
    assert rollout.returns[1, : lengths[1]].tolist() == pytest.approx([-1.0] * lengths[1])
    bias = (sum(first) - lengths[1]) / sum(lengths)
    assert rollout.old_values[rollout.mask].tolist() == pytest.approx([bias] * sum(lengths))
    assert curves["reward"] == pytest.approx((1.5 + 1.0) / 2)
    assert curves["reward_with_kl"] == pytest.approx((1.5 - 1.0) / 2)
    assert curves["share_finished"] == 0.5
    assert curves["kl"] == 0


def test_advantages_are_whitened_gae_and_returns_are_not_whitened(
    base_dir: Path, sft: Path
) -> None:
    """By the sums of Schulman et al. (2016), equation 16, token by token, in float64."""
    gamma, lam = 0.9, 0.5
    model, tokenizer = load_model(base_dir, sft)
    disturb(model.policy_parameters())
    disturb(model.value_parameters())
    recipe = RECIPE.model_copy(
        update={"gamma": gamma, "gae_lambda": lam, "kl_coefficient": 0.2, "micro_batch_size": 2}
    )
    episodes = episodes_of(tokenizer)
    earned = [[(0, 1.0)], [(0, -1.0)], [(2, 0.5), (4, 2.0)], [(1, 0.25)]]
    rollout, _ = roll_out(model, episodes, earned, recipe, first=False)
    reference = torch.cat([model.reference_log_probs(part) for _, part in rollout.parts])
    rewards = (-0.2 * (rollout.old_log_p - reference)).double()
    assert rewards.abs().max() > 1e-3, "the KL penalty is part of the reward"
    advantages, returns = [], []
    for row, (episode, pairs) in enumerate(zip(episodes, earned, strict=True)):
        for token, reward in pairs:
            rewards[row, token] += reward
        n = len(episode.response)
        r, v = rewards[row, :n].tolist(), [*rollout.old_values[row, :n].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        own = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
        advantages += own
        returns += [a + value for a, value in zip(own, v, strict=False)]
    mean, deviation = np.mean(advantages), np.std(advantages, ddof=1)
    whitened = [(a - mean) / deviation for a in advantages]
    assert abs(deviation - 1) > 0.1, "as they are, they could pass for whitened"
    assert rollout.advantages[rollout.mask].tolist() == pytest.approx(whitened, abs=1e-4)
    assert rollout.returns[rollout.mask].tolist() == pytest.approx(returns, abs=1e-4)
    assert (rollout.advantages[~rollout.mask] == 0).all()


# -- training ---------------------------------------------------------------------------------


def test_what_pays_becomes_likelier_and_kl_stays_bounded(
    base_dir: Path, sft: Path, tmp_path: Path
) -> None:
    """Reward: how often the token " (" stands in the response."""
    adapter, facts = _train(
        base_dir,
        sft,
        tmp_path / "work",
        lambda text: float(text.count(" (")),
        batches=14,
        batch_size=24,
        micro_batch_size=12,
        minibatches=2,
        epochs_per_batch=4,
        kl_target=0.1,
        kl_coefficient=0.1,
        learning_rate=3e-3,  # at 5e-3 the path hangs on rounding: KL ends between 8 and 31 by seed
        temperature=0.6,
    )
    rewards, kl = _curve(facts, "reward"), _curve(facts, "kl")
    assert sum(rewards[-3:]) > 1.8 * sum(rewards[:3]), rewards
    assert kl[0] == 0
    assert 1 < max(kl) < 20, kl
    assert facts["batches"] == 14
    assert facts["episodes"] == 14 * 24
    assert set(facts["curves"]) >= {"entropy", "value_loss", "clip_fraction", "approx_kl"}
    assert {path.suffix for path in adapter.iterdir()} == {".safetensors", ".json"}
    assert str(base_dir) not in (adapter / "adapter_config.json").read_text()


def test_a_constant_reward_leaves_the_policy_where_it_is(
    base_dir: Path, sft: Path, tmp_path: Path
) -> None:
    adapter, facts = _train(base_dir, sft, tmp_path / "work", lambda text: 0.3, batches=4)
    assert max(map(abs, _curve(facts, "kl"))) < 1e-3
    assert max(_curve(facts, "value_loss")) < 1e-6
    changed = [w.abs().max() for name, w in _weights(adapter).items() if "lora_B" in name]
    assert max(changed) < 1e-4


def test_the_published_adapter_is_the_trained_policy(
    base_dir: Path, sft: Path, tmp_path: Path
) -> None:
    """Merged after SFT's, it gives the logits of the last checkpoint."""
    adapter, _ = _train(base_dir, sft, tmp_path / "work", gradient_checkpointing=True)
    model, tokenizer = load_model(base_dir, sft)
    saved = load_file(tmp_path / "work" / "batch-00003" / "parameters.safetensors")
    for name, parameter in model.policy_parameters().items():
        parameter.data.copy_(saved[name])
    merged, _ = load_policy(base_dir, [sft, adapter], dtype=torch.float32, device=CPU.torch)
    start, _ = load_policy(base_dir, [sft], dtype=torch.float32, device=CPU.torch)
    ids = torch.tensor([prompt_ids(tokenizer, PROMPTS["prompt"][0])])
    model.peft.set_adapter("policy")
    with torch.no_grad():
        expected, found = model.peft(input_ids=ids).logits, merged(input_ids=ids).logits
        before = start(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert (found - before).abs().max() > 0.01


def test_with_the_reward_model_by_item_in_bfloat16(
    base_dir: Path, sft: Path, reward_dir: Path, tmp_path: Path
) -> None:
    adapter, facts = _train(
        base_dir,
        sft,
        tmp_path / "work",
        reward="model",
        reward_dir=reward_dir,
        granularity="item",
        dtype="bfloat16",
    )
    assert _curve(facts, "kl")[0] == 0, "the reference is the start in any dtype"
    assert torch.tensor(list(facts["curves"].values())).isfinite().all()
    assert {w.dtype for w in _weights(adapter).values()} == {torch.float32}
    with pytest.raises(ValueError, match="needs reward_dir"):
        _train(base_dir, sft, tmp_path / "none", reward="model")


def test_only_training_users_are_sampled_scored_and_named(
    base_dir: Path, sft: Path, tmp_path: Path
) -> None:
    split = ["train", "validation", "test"] * 8
    scorer = Scripted(len)
    _, facts = _train(
        base_dir, sft, tmp_path / "work", prompts=PROMPTS.assign(split=split), scorer=scorer
    )
    assert set(facts["trained_user_ids"]) == scorer.users <= set(range(0, N, 3))
    assert facts["prompts"] == 8
    with pytest.raises(DataError, match=r"none of the 24 prompts is of the training split"):
        _train(base_dir, sft, tmp_path / "none", prompts=PROMPTS.assign(split="validation"))


def test_batches_pass_over_all_prompts_before_any_comes_again() -> None:
    drawn = [batch_prompts(10, 4, batch, seed=1) for batch in range(1, 6)]
    places = [index for batch in drawn for index in batch]
    assert sorted(places[:10]) == sorted(places[10:]) == list(range(10))
    assert places[:10] != places[10:]
    assert batch_prompts(10, 4, 3, seed=1) == drawn[2]
    assert batch_prompts(10, 4, 3, seed=2) != drawn[2]


def test_far_from_the_reference_the_training_stops_and_says_so(
    base_dir: Path, sft: Path, tmp_path: Path
) -> None:
    _, facts = _train(
        base_dir, sft, tmp_path / "work", len, batches=6, learning_rate=0.05, kl_stop=0.5
    )
    assert facts["stopped_early"]
    assert 1 < facts["batches"] < 6
    assert _curve(facts, "kl")[-1] > 0.5 > max(_curve(facts, "kl")[:-1])
    assert facts["steps"] == 2 * (facts["batches"] - 1), "no step is taken on the last batch"
    # a rerun publishes, and trains no further
    _, again = _train(
        base_dir, sft, tmp_path / "work", len, batches=6, learning_rate=0.05, kl_stop=0.5
    )
    assert again["batches"] == again["resumed_at"] == facts["batches"]
    assert again["curves"] == facts["curves"]


def test_far_from_the_sampling_policy_a_batch_is_given_up(
    base_dir: Path, sft: Path, tmp_path: Path
) -> None:
    changes = {"learning_rate": 0.05, "epochs_per_batch": 5, "batches": 1}
    _, facts = _train(base_dir, sft, tmp_path / "near", len, kl_target=1e-3, **changes)
    assert facts["steps"] == 1, "the first ratio is 1; the second is past the target"
    assert _curve(facts, "approx_kl")[0] > 1e-3
    _, facts = _train(base_dir, sft, tmp_path / "far", len, kl_target=1e3, **changes)
    assert facts["steps"] == 5


# -- resuming ---------------------------------------------------------------------------------


def test_killed_after_any_batch_the_result_is_bit_equal(
    base_dir: Path, sft: Path, tmp_path: Path
) -> None:
    class Died(Exception):
        pass

    def die(event) -> None:
        raise Died

    options = {"minibatches": 2, "samples_per_prompt": 2, "micro_batch_size": 2}
    expected, facts = _train(base_dir, sft, tmp_path / "undisturbed", **options)
    work = tmp_path / "killed"
    for _ in range(3):
        with pytest.raises(Died):
            _train(base_dir, sft, work, progress=die, **options)
    # what a kill while saving leaves behind
    (work / "unfinished").mkdir()
    found, resumed = _train(base_dir, sft, work, **options)
    assert resumed["resumed_at"] == 3
    assert resumed["curves"] == facts["curves"]
    assert resumed["steps"] == facts["steps"]
    assert resumed["trained_user_ids"] == facts["trained_user_ids"]
    assert sorted(path.name for path in work.glob("batch-*")) == ["batch-00002", "batch-00003"]
    ours, theirs = _weights(found), _weights(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


_CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_ppo
base, sft, work = map(Path, sys.argv[1:])
test_ppo._train(base, sft, work, progress=lambda event: print(event.step, flush=True))
"""


def test_killed_by_the_system_and_started_again(base_dir: Path, sft: Path, tmp_path: Path) -> None:
    expected, facts = _train(base_dir, sft, tmp_path / "undisturbed")
    work = tmp_path / "killed"
    code = _CHILD.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(base_dir), str(sft), str(work)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == "1":
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    assert child.returncode == -signal.SIGKILL
    found, resumed = _train(base_dir, sft, work)
    assert 1 <= resumed["resumed_at"] < 3
    assert resumed["curves"] == facts["curves"]
    ours, theirs = _weights(found), _weights(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ["parameters.safetensors", "optimizer.pt", "state.json"])
def test_a_damaged_checkpoint_costs_a_batch_and_not_the_training(
    base_dir: Path, sft: Path, tmp_path: Path, name: str
) -> None:
    expected, _ = _train(base_dir, sft, tmp_path / "undisturbed")
    theirs = _weights(expected)
    work = tmp_path / "damaged"
    _train(base_dir, sft, work)
    damaged = work / "batch-00003" / name
    damaged.write_bytes(damaged.read_bytes()[:7])
    found, resumed = _train(base_dir, sft, work)
    assert resumed["resumed_at"] == 2
    ours = _weights(found)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_advantages_are_whitened_over_the_batch(base_dir: Path, sft: Path) -> None:
    model, tokenizer = load_model(base_dir, sft)
    disturb(model.value_parameters())
    recipe = RECIPE.model_copy(update={"gamma": 0.9, "gae_lambda": 0.5, "batch_size": 4})
    earned = [[(0, 1.0)], [(0, 2.0)], [(0, -1.0)], [(0, 0.5)]]
    rollout, _ = roll_out(model, episodes_of(tokenizer), earned, recipe, first=True)
    marked = rollout.advantages[rollout.mask]
    assert float(marked.mean()) == pytest.approx(0, abs=1e-5)
    assert float(marked.std()) == pytest.approx(1, rel=1e-3)
    raw = (rollout.returns - rollout.old_values)[rollout.mask]
    assert torch.allclose(marked, (raw - raw.mean()) / raw.std(), atol=1e-3)


def test_every_epoch_steps_once_a_minibatch_with_clipped_gradients(
    base_dir: Path, sft: Path
) -> None:
    model, tokenizer = load_model(base_dir, sft)
    recipe = RECIPE.model_copy(
        update={
            "batch_size": 4,
            "micro_batch_size": 1,
            "minibatches": 2,
            "epochs_per_batch": 3,
            "max_grad_norm": 1e-3,
            "kl_target": 1e9,
        }
    )
    groups = [model.policy_parameters(), model.value_parameters()]
    optimizer = torch.optim.SGD([{"params": list(g.values())} for g in groups], lr=1e-3)
    norms = []

    def watch(*arguments) -> None:
        for group in groups:
            gradients = [p.grad.flatten() for p in group.values() if p.grad is not None]
            norms.append(float(torch.cat(gradients).norm()))

    optimizer.register_step_pre_hook(watch)
    earned = [[(0, 100.0)], [(0, 0.0)], [(0, -50.0)], [(0, 10.0)]]
    rollout, _ = roll_out(model, episodes_of(tokenizer), earned, recipe, first=True)
    steps, _ = take_steps(model, optimizer, rollout, recipe, np.random.default_rng(0))
    assert steps == 3 * 2
    assert len(norms) == steps * len(groups)
    assert max(norms) <= 1e-3 * (1 + 1e-4)
