"""PPO from the SFT policy (paper §3.5, equation 1; Schulman et al., 2017; Ouyang et al., 2022).

What belongs here: sampling episodes, the training loop and its checkpoints. What does not: what an
episode earns (``ppo_rewards``), tensor arithmetic (``ppo_losses``), forward passes
(``ppo_model``), drawing tokens (``sampling``).

A batch: sample responses from the prompts alone, score them, then take a few epochs of clipped
steps on them. An action is a token, the end token included; a response's states begin where its
prompt ends. A token's reward is -kl_coefficient (log π - log π_ref), plus what the response earns
there.

Killed at any moment, the next call with the same ``work_dir`` goes on from the last finished
batch; on CPU in fp32 the result equals an undisturbed run's bit for bit. Nothing is drawn from a
global generator once the adapters exist: prompts, sampling noise and the order of minibatches are
functions of the seed and of the batch's number. Where the device runs out of memory, it goes on
from the last finished batch with smaller micro batches (``memory``).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from llmrec_assets.ground.errors import DataError, ModelError
from llmrec_assets.ground.recipes import RlhfRecipe
from llmrec_assets.models import ppo_losses as losses
from llmrec_assets.models.chat import completion_ids, prompt_ids, stop_ids
from llmrec_assets.models.device import Device, peak_memory_gb, usable_dtype
from llmrec_assets.models.loading import load_policy
from llmrec_assets.models.memory import (
    FittingBatches,
    is_out_of_memory,
    train_in_fitting_batches,
)
from llmrec_assets.models.ppo_model import PpoModel, TokenBatch, token_batch
from llmrec_assets.models.ppo_rewards import (
    Episode,
    ModelReward,
    NdcgReward,
    Prompt,
    Reward,
    Scorer,
)
from llmrec_assets.models.progress import Progress, ProgressEvent, silent
from llmrec_assets.models.sampling import Decoding, sample_rows, stream
from llmrec_assets.models.training import library_versions, save_adapter

#: Checkpoints kept: the newest, and one more should a disk lose the newest's content.
_KEPT = 2


@dataclass(frozen=True)
class Rollout:
    """A batch of episodes, shortest first, and what the policy that sampled them makes of them.

    Tensors are [batch_size, T]. ``parts`` are its micro batches: the same ones, padding included,
    measure ``old_log_p`` and take the steps, so that the first ratio is 1 in any dtype. ``groups``:
    which of them make up each of the recipe's micro batches, from which minibatches are drawn.
    """

    episodes: list[Episode]
    parts: list[tuple[slice, TokenBatch]]
    groups: list[list[int]]
    mask: torch.Tensor
    old_log_p: torch.Tensor
    old_values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


@dataclass
class _State:
    """Where a training stands: all that is not a tensor. ``curves`` hold (batch, value)."""

    batch: int = 0
    steps: int = 0
    stopped_early: bool = False
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    phase_seconds: dict[str, float] = field(
        default_factory=lambda: {"sampling": 0.0, "scoring": 0.0, "updating": 0.0}
    )

    def record(self, **values: float) -> None:
        for name, value in values.items():
            self.curves.setdefault(name, []).append((self.batch, value))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.phase_seconds[phase] += time.monotonic() - started


def batch_prompts(n_prompts: int, per_batch: int, batch: int, seed: int) -> list[int]:
    """Indices of the prompts of batch 1, 2, …: passes over all prompts, each in an order of its
    own; a pure function of (seed, batch)."""
    chosen = []
    for place in range((batch - 1) * per_batch, batch * per_batch):
        lap, step = divmod(place, n_prompts)
        order = np.random.default_rng(stream(seed, "ppo", "prompts", lap)).permutation(n_prompts)
        chosen.append(int(order[step]))
    return chosen


def sample_episodes(
    model: PpoModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    recipe: RlhfRecipe,
    *,
    stops: list[int],
    seed: int,
    batch: int,
    rows: FittingBatches,
) -> list[Episode]:
    """``samples_per_prompt`` responses of the present policy to each prompt, shortest first.

    ``rows``: how many are sampled at once.
    """
    n = recipe.samples_per_prompt
    streams = [
        # Numbered through the batch: a prompt may stand in it twice.
        [stream(seed, "ppo", batch, p.user_id, p.window_index, i * n + k) for k in range(n)]
        for i, p in enumerate(prompts)
    ]
    decoding = Decoding(
        temperature=recipe.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=recipe.max_new_tokens,
        do_sample=True,
    )
    with model.sampling() as policy:
        sampled = sample_rows(
            policy,
            [p.tokens for p in prompts],
            streams,
            decoding,
            stops=stops,
            pad=tokenizer.pad_token_id,
            rows=rows,
        )
    episodes = [
        Episode(
            prompt=prompt,
            response=sample.tokens + ([] if sample.stop is None else [sample.stop]),
            finished=sample.stop is not None,
            text=tokenizer.decode(sample.tokens, skip_special_tokens=True),
        )
        for prompt, samples in zip(prompts, sampled, strict=True)
        for sample in samples
    ]
    # Rows of one micro batch are of one length, nearly: padding costs compute.
    return sorted(episodes, key=lambda e: len(e.prompt.tokens) + len(e.response))


def roll_out(
    model: PpoModel,
    episodes: list[Episode],
    earned: list[list[tuple[int, float]]],
    recipe: RlhfRecipe,
    *,
    first: bool,
    at_once: int | None = None,
) -> tuple[Rollout, dict[str, float]]:
    """Measures the episodes under policy, reference and value; returns also the batch's curves.

    ``at_once``: episodes of a forward pass, where the recipe's micro batches do not fit.

    ``first`` sets the value head's bias to the mean reward to go: where all earn the same there is
    then nothing to learn, and nothing for whitening to blow up.
    """
    width = max(len(e.response) for e in episodes)
    parts: list[tuple[slice, TokenBatch]] = []
    groups = []
    for start in range(0, len(episodes), recipe.micro_batch_size):
        end = min(start + recipe.micro_batch_size, len(episodes))
        step = at_once or recipe.micro_batch_size
        rows_of_group = [slice(i, min(i + step, end)) for i in range(start, end, step)]
        groups.append(list(range(len(parts), len(parts) + len(rows_of_group))))
        for rows in rows_of_group:
            asked = [e.prompt.tokens for e in episodes[rows]]
            answered = [e.response for e in episodes[rows]]
            parts.append((rows, token_batch(asked, answered, width, model.device)))
    mask = torch.cat([part.mask for _, part in parts])
    measured = [model.log_probs_and_entropies(part) for _, part in parts]
    log_p = torch.cat([log_p for log_p, _ in measured])
    entropies = torch.cat([entropies for _, entropies in measured])
    reference = torch.cat([model.reference_log_probs(part) for _, part in parts])

    rewards = losses.kl_penalty(log_p, reference, mask, recipe.kl_coefficient).cpu()
    for row, (episode, pairs) in enumerate(zip(episodes, earned, strict=True)):
        for token, reward in pairs:
            rewards[row, token] += reward
        if not episode.finished:
            rewards[row, len(episode.response) - 1] -= recipe.missing_end_penalty
    rewards = rewards.to(model.device)

    if first:
        _, to_go = losses.gae(rewards, torch.zeros_like(rewards), mask, recipe.gamma, 1.0)
        with torch.no_grad():
            # On the CPU in float64, where the mean of equal numbers is that number.
            model.value_head.bias.fill_(float(to_go[mask].cpu().double().mean()))
    with torch.no_grad():
        values = torch.cat([model.values(part) for _, part in parts])
    advantages, returns = losses.gae(rewards, values, mask, recipe.gamma, recipe.gae_lambda)

    rollout = Rollout(
        episodes=episodes,
        parts=parts,
        groups=groups,
        mask=mask,
        old_log_p=log_p,
        old_values=values,
        advantages=losses.whiten(advantages, mask),
        returns=returns,
    )
    n = len(episodes)
    curves = {
        "reward": sum(reward for pairs in earned for _, reward in pairs) / n,
        "reward_with_kl": float(rewards.sum()) / n,
        "kl": float((log_p - reference).sum()) / n,
        "entropy": float(losses.masked_mean(entropies, mask)),
        "explained_variance": losses.explained_variance(values, returns, mask),
        "response_length": float(mask.sum()) / n,
        "share_finished": sum(e.finished for e in episodes) / n,
    }
    return rollout, curves


def accumulate_gradients(
    model: PpoModel, rollout: Rollout, parts: Sequence[int], recipe: RlhfRecipe
) -> dict[str, float]:
    """Adds the gradients of both losses over the named micro batches, one minibatch.

    Each micro batch counts by its tokens, so that their sum is the gradient of the minibatch's
    mean. Policy and value run one after the other: their activations are never held together.
    """
    n_tokens = sum(rollout.parts[i][1].n_tokens for i in parts)
    totals = torch.zeros(4, device=model.device)
    for i in parts:
        rows, part = rollout.parts[i]
        mask, old_log_p = part.mask, rollout.old_log_p[rows]
        share = part.n_tokens / n_tokens
        log_p = model.log_probs(part)
        loss, clipped = losses.policy_loss(
            log_p, old_log_p, rollout.advantages[rows], mask, recipe.clip
        )
        (loss * share).backward()
        kl = losses.approximate_kl(log_p.detach(), old_log_p, mask)
        values = model.values(part)
        value_loss = losses.value_loss(
            values, rollout.old_values[rows], rollout.returns[rows], mask, recipe.value_clip
        )
        (value_loss * share).backward()
        totals += share * torch.stack([loss.detach(), value_loss.detach(), clipped, kl])
    names = ("policy_loss", "value_loss", "clip_fraction", "approx_kl")
    return dict(zip(names, totals.tolist(), strict=True))


def take_steps(
    model: PpoModel,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    recipe: RlhfRecipe,
    rng: np.random.Generator,
) -> tuple[int, dict[str, float]]:
    """The epochs on one batch; returns the steps taken and the batch's curves.

    A minibatch is drawn from the recipe's micro batches, whole. Once the policy is ``kl_target``
    away from the one that sampled, no further step is taken on what the latter said.
    """
    measured: list[dict[str, float]] = []
    for _ in range(recipe.epochs_per_batch):
        order = rng.permutation(len(rollout.groups)).tolist()
        size = len(order) // recipe.minibatches
        for start in range(0, len(order), size):
            parts = [
                part for group in order[start : start + size] for part in rollout.groups[group]
            ]
            found = accumulate_gradients(model, rollout, parts, recipe)
            if found["approx_kl"] > recipe.kl_target:
                optimizer.zero_grad()
                return len(measured), _summary(measured) | {"approx_kl": found["approx_kl"]}
            measured.append(found)
            for group in optimizer.param_groups:
                norm = torch.nn.utils.clip_grad_norm_(group["params"], recipe.max_grad_norm)
                if not bool(norm.isfinite()):  # before the step: no checkpoint holds it
                    raise ModelError(
                        "PPO's gradient is no number: lower rlhf.learning_rate and "
                        "rlhf.value_learning_rate, or look at the reward model's scores"
                    )
            optimizer.step()
            optimizer.zero_grad()
    return len(measured), _summary(measured) | {"approx_kl": measured[-1]["approx_kl"]}


def _summary(measured: list[dict[str, float]]) -> dict[str, float]:
    names = ("policy_loss", "value_loss", "clip_fraction")
    return {name: sum(m[name] for m in measured) / len(measured) for name in names}


def train_ppo(
    base_dir: Path,
    sft_adapter: Path,
    prompts: pd.DataFrame,
    recipe: RlhfRecipe,
    *,
    reward_dir: Path | None,
    scorer: Scorer | None,
    seed: int,
    work_dir: Path,
    device: Device,
    progress: Progress = silent,
) -> tuple[Path, dict[str, Any]]:
    """Trains the policy; returns its adapter (to be merged after SFT's) and JSON facts.

    Args:
        base_dir: a base model as ``base.prepare_base_model`` writes it.
        sft_adapter: SFT's adapter; merged, it is the start and the reference.
        prompts: ``schemas.PROMPTS``; rows of the training split are used, others never.
        reward_dir: the reward model, for ``recipe.reward`` ``model``.
        scorer: measures NDCG@k, for ``recipe.reward`` ``ndcg``.
        work_dir: checkpoints live here; name it by the version to be published.

    Facts: ``curves`` hold (batch, value) by name. ``reward`` is what the reward function gives,
    ``reward_with_kl`` what is maximised (KL penalty and missing ends included), ``kl`` nats a
    response from the reference, ``entropy`` nats a token, ``approx_kl`` nats a token from the
    policy that sampled, as last measured. A training that ends by ``kl_stop`` says
    ``stopped_early`` and publishes the policy as it is.

    Raises:
        DataError: there is no training prompt.
        ValueError: what the recipe's reward needs is not given.
        OutOfMemoryError: the device cannot hold even one episode.
    """
    train = prompts[prompts["split"] == "train"].sort_values(["user_id", "window_index"])
    if train.empty:
        raise DataError(
            f"PPO has no training prompt: none of the {len(prompts)} prompts is of the training "
            "split, and users of other splits are never trained on; raise splits.train or lower "
            "windows.min_per_class in the recipe"
        )
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    columns = [train[name].tolist() for name in ("user_id", "window_index", "prompt")]
    asked = [
        Prompt(user_id, window_index, prompt_ids(tokenizer, prompt))
        for user_id, window_index, prompt in zip(*columns, strict=True)
    ]
    longest = max(len(p.tokens) for p in asked)

    def attempt(at_once: int) -> tuple[Path, dict[str, Any]]:
        return _train(
            base_dir,
            sft_adapter,
            asked,
            recipe,
            at_once=at_once,
            reward_dir=reward_dir,
            scorer=scorer,
            seed=seed,
            work_dir=work_dir,
            device=device,
            progress=progress,
        )

    (adapter_dir, facts), memory = train_in_fitting_batches(
        attempt,
        what="PPO",
        micro_batch_size=recipe.micro_batch_size,
        batch_size=recipe.micro_batch_size,  # whose parts they are
        work_dir=work_dir,
        stands_at=lambda: _batches_kept(work_dir),
        device=device,
        remedy="rlhf.gradient_checkpointing: true; a smaller rlhf.max_new_tokens; a shorter "
        f"prompts.template (the longest prompt has {longest} tokens)",
        progress=progress,
    )
    return adapter_dir, {**facts, **memory}


def _train(
    base_dir: Path,
    sft_adapter: Path,
    asked: list[Prompt],
    recipe: RlhfRecipe,
    *,
    at_once: int,
    reward_dir: Path | None,
    scorer: Scorer | None,
    seed: int,
    work_dir: Path,
    device: Device,
    progress: Progress,
) -> tuple[Path, dict[str, Any]]:
    """One try, with at most ``at_once`` episodes in a forward pass."""
    started = time.monotonic()
    dtype = usable_dtype(device, recipe.dtype)
    base, tokenizer = load_policy(base_dir, [sft_adapter], dtype=dtype, device=device.torch)
    stops = stop_ids(tokenizer, base)
    by_model = recipe.reward == "model"
    torch.manual_seed(seed)
    model = PpoModel(
        base,
        recipe.lora,
        temperature=recipe.temperature,
        reward_dir=reward_dir if by_model else None,
        gradient_checkpointing=recipe.gradient_checkpointing,
    )
    reward: Reward
    if by_model and reward_dir is not None:
        end_of_turn = completion_ids(tokenizer, "q", "a")[-1]
        reward = ModelReward(model, tokenizer, recipe.granularity, end_of_turn, at_once)
    elif not by_model and scorer is not None:
        reward = NdcgReward(scorer, tokenizer, recipe.granularity)
    else:
        raise ValueError(f"reward {recipe.reward} needs {'reward_dir' if by_model else 'scorer'}")
    optimizer = torch.optim.AdamW(
        [
            {"params": list(model.policy_parameters().values()), "lr": recipe.learning_rate},
            {"params": list(model.value_parameters().values()), "lr": recipe.value_learning_rate},
        ],
        weight_decay=0.0,
        fused=device.type == "cuda",
    )
    rows = FittingBatches(
        what="PPO's sampling",
        item="response",
        size=None,
        device=device.torch,
        remedy="a smaller rlhf.max_new_tokens; a shorter prompts.template",
        progress=progress,
    )
    state = _resume(work_dir, model, optimizer) or _State()
    resumed_at = state.batch
    per_batch = recipe.batch_size // recipe.samples_per_prompt
    began = time.monotonic()

    while state.batch < recipe.batches and not state.stopped_early:
        state.batch += 1
        with state.timed("sampling"):
            chosen = batch_prompts(len(asked), per_batch, state.batch, seed)
            episodes = sample_episodes(
                model,
                tokenizer,
                [asked[i] for i in chosen],
                recipe,
                stops=stops,
                seed=seed,
                batch=state.batch,
                rows=rows,
            )
        with state.timed("scoring"):
            rollout, curves = roll_out(
                model,
                episodes,
                reward(episodes),
                recipe,
                first=state.batch == 1,
                at_once=at_once,
            )
        state.record(**curves)
        state.stopped_early = curves["kl"] > recipe.kl_stop
        if not state.stopped_early:
            with state.timed("updating"):
                rng = np.random.default_rng(stream(seed, "ppo", "minibatches", state.batch))
                steps, curves = take_steps(model, optimizer, rollout, recipe, rng)
            state.steps += steps
            state.record(**curves)
        _save(work_dir, model, optimizer, state)
        per_second = (state.batch - resumed_at) / (time.monotonic() - began)
        progress(
            ProgressEvent(
                what="PPO",
                step=state.batch,
                total=recipe.batches,
                examples_per_second=per_second * recipe.batch_size,
                seconds_left=(recipe.batches - state.batch) / per_second,
                loss=curves.get("policy_loss"),
            )
        )

    trained_on = {
        asked[i].user_id
        for batch in range(1, state.batch + 1)
        for i in batch_prompts(len(asked), per_batch, batch, seed)
    }
    episodes_seen = state.batch * recipe.batch_size
    facts = {
        "prompts": len(asked),
        "users": len(trained_on),
        "episodes": episodes_seen,
        "batches": state.batch,
        "steps": state.steps,
        "stopped_early": state.stopped_early,
        "resumed_at": resumed_at,
        "seconds": round(time.monotonic() - started, 1),
        "seconds_per_episode": round(sum(state.phase_seconds.values()) / episodes_seen, 3),
        "phase_seconds": {name: round(s, 1) for name, s in state.phase_seconds.items()},
        "longest_prompt": max(len(p.tokens) for p in asked),
        "trainable_parameters": sum(
            p.numel() for group in optimizer.param_groups for p in group["params"]
        ),
        "peak_memory_gb": round(peak_memory_gb(device), 2),
        "device": device.name,
        "threads": torch.get_num_threads(),
        "libraries": library_versions(),
        "trained_user_ids": sorted(trained_on),
        "curves": state.curves,
    }
    adapter_dir = save_adapter(model.peft, work_dir / "adapter", base_dir.name, adapter="policy")
    return adapter_dir, facts


def _save(work_dir: Path, model: PpoModel, optimizer: torch.optim.Optimizer, state: _State) -> None:
    """Publishes ``batch-00007`` by rename: it is whole or not there."""
    aside = work_dir / "unfinished"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    save_file(_parameters(model), aside / "parameters.safetensors")
    torch.save(optimizer.state_dict(), aside / "optimizer.pt")
    (aside / "state.json").write_text(json.dumps(asdict(state)), encoding="utf-8")
    for path in aside.iterdir():  # on the disk before the name is: power fails too
        with path.open("rb") as file:
            os.fsync(file.fileno())
    aside.rename(work_dir / f"batch-{state.batch:05d}")
    for old in sorted(work_dir.glob("batch-*"))[:-_KEPT]:
        shutil.rmtree(old)


def _batches_kept(work_dir: Path) -> int:
    return max((int(path.name[-5:]) for path in work_dir.glob("batch-*")), default=0)


def _resume(work_dir: Path, model: PpoModel, optimizer: torch.optim.Optimizer) -> _State | None:
    """Restores the newest checkpoint that can be read; None where there is none. One that a disk
    has lost is set aside: a batch is done again, instead of failing for ever."""
    for newest in sorted(work_dir.glob("batch-*"), reverse=True):
        try:
            saved = load_file(newest / "parameters.safetensors")
            steps = torch.load(newest / "optimizer.pt", map_location="cpu", weights_only=True)
            state = _State(**json.loads((newest / "state.json").read_text(encoding="utf-8")))
        except Exception as error:  # three formats, each with errors of its own for damage
            missing = isinstance(error, FileNotFoundError)
            if is_out_of_memory(error) or (isinstance(error, OSError) and not missing):
                raise  # no fault of the files
            aside = work_dir / f"damaged-{newest.name}"
            shutil.rmtree(aside, ignore_errors=True)
            newest.rename(aside)
            continue
        parameters = _parameters(model)
        for name, values in saved.items():
            parameters[name].copy_(values)
        optimizer.load_state_dict(steps)
        state.curves = {name: [(b, v) for b, v in curve] for name, curve in state.curves.items()}
        return state
    return None


def _parameters(model: PpoModel) -> dict[str, torch.Tensor]:
    """What is trained, by name, sharing memory with the model."""
    trained = model.policy_parameters() | model.value_parameters()
    return {name: parameter.detach() for name, parameter in trained.items()}
