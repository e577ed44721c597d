"""The reward model: scores a response given its prompt (paper §3.5).

What belongs here: the sequence classifier on the merged SFT policy, its training on preference
pairs, and scoring with a published one. What does not: pairs and their token ids (``pairs``),
using the score (``ppo``).

**Where the score is read.** At the answer's last token, the end of turn. ``transformers`` reads
it at the last token that is not padding, judging by the token's id: where the tokenizer pads with
the end of turn (SmolLM2), that is one token too early. So we pad with another id (``padding_id``).

**What is published.** ``adapter_model.safetensors`` holds LoRA weights, which fit the causal
model too (``load_adapter(reward_dir, adapter_name="reward")``), and the score head, which a
causal model leaves aside: ``score_head`` reads it. score = head · last hidden state at the
answer's last token, after the final norm, in float32.

Killed at any moment, the next call with the same ``work_dir`` resumes from the last complete
trainer checkpoint; on CPU in fp32 the result equals an undisturbed run's bit for bit. Where the
device runs out of memory, it goes on from there with smaller micro batches (``memory``).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.trainer_callback import PrinterCallback
from trl import RewardConfig, RewardTrainer

from llmrec_assets.ground.errors import StoreError
from llmrec_assets.ground.intervals import bootstrap_means
from llmrec_assets.ground.recipes import EvaluationRecipe, RewardRecipe
from llmrec_assets.models.chat import completion_ids, prompt_ids
from llmrec_assets.models.device import Device, usable_dtype
from llmrec_assets.models.fast_layers import speed_up
from llmrec_assets.models.loading import load_policy
from llmrec_assets.models.memory import FittingBatches
from llmrec_assets.models.pairs import (
    EqualPairs,
    SplitPairs,
    TokenizedPair,
    require_fit,
    sequence_lengths,
    split_pairs,
    tokenize_pairs,
    train_on_pairs,
    trainer_settings,
    training_facts,
)
from llmrec_assets.models.progress import Progress, silent
from llmrec_assets.models.shared_prompts import (
    PairCollator,
    by_pair,
    ends,
    is_fit,
    model_inputs,
)
from llmrec_assets.models.training import (
    ReportProgress,
    last_complete_checkpoint,
    lora_config,
    save_adapter,
)

_SCORE_KEY = "base_model.model.score.weight"


class _ScoreHead(torch.nn.Linear):
    """Scores in float32 whatever the model computes in.

    In bfloat16 the head's updates would be rounded away, and scores a hundredth apart tie.
    """

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float())


def padding_id(tokenizer: Any) -> int:
    """The tokenizer's pad id, or another id where that one ends an answer (or there is none)."""
    end = completion_ids(tokenizer, "q", "a")[-1]
    if tokenizer.pad_token_id not in (None, end):
        return tokenizer.pad_token_id
    return 1 if end == 0 else 0


def sequence_classifier(policy: Any, tokenizer: Any, *, seed: int) -> Any:
    """A one-score classifier on ``policy``'s own layers, its head drawn from ``seed``.

    The head is [1, hidden] without bias, drawn as ``transformers`` draws it. The classifier and
    ``policy`` share their weights.
    """
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    config.pad_token_id = padding_id(tokenizer)
    with torch.device("meta"):  # its own layers are replaced at once
        classifier = AutoModelForSequenceClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, policy.base_model)
    torch.manual_seed(seed)
    head = _ScoreHead(config.hidden_size, 1, bias=False)
    torch.nn.init.normal_(head.weight, std=config.initializer_range)
    classifier.score = head.to(policy.device)
    return classifier.eval()


class _PairTrainer(EqualPairs, RewardTrainer):
    """``RewardTrainer`` in which every pair of a step counts the same, its prompt computed once."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """-log σ(r_chosen - r_rejected), mean over pairs."""
        chosen, rejected = pair_scores(model, inputs, bf16=self.args.bf16).unbind(dim=1)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        training = self.model.training
        logged = self._metrics["train" if training else "eval"]
        logged["margin"].append((chosen - rejected).mean().item())
        logged["accuracy"].append((chosen > rejected).float().mean().item())
        if training:
            loss = self.weighted(loss, inputs)
        return (loss, None) if return_outputs else loss


def pair_scores(model: Any, batch: dict[str, torch.Tensor], *, bf16: bool) -> torch.Tensor:
    """Scores of (chosen, rejected) at their ends of turn, float32 [pairs, 2].

    Args:
        model: the classifier, in its adapter or not. Its own forward pass reads one score a row.
        batch: as ``PairCollator`` makes it.
    """
    classifier = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.autocast(classifier.device.type, torch.bfloat16, enabled=bf16):
        backbone = getattr(classifier, classifier.base_model_prefix)
        hidden = backbone(**model_inputs(batch)).last_hidden_state
        places = ends(batch["parts"])
        rows = torch.arange(len(places), device=places.device)[:, None]
        return by_pair(classifier.score(hidden[rows, places]).squeeze(-1), batch["parts"])


def _scores(
    model: Any, sequences: Sequence[list[int]], batch_size: int, progress: Progress = silent
) -> NDArray[np.float32]:
    """Scores of token sequences, each ended by the end of turn, [n]."""
    model.eval()
    pad = model.config.pad_token_id

    def scored(rows: Sequence[int]) -> NDArray[np.float32]:
        width = len(sequences[rows[-1]])
        ids = torch.tensor([sequences[i] + [pad] * (width - len(sequences[i])) for i in rows])
        lengths = torch.tensor([[len(sequences[i])] for i in rows])
        mask = (torch.arange(width) < lengths).long()
        with torch.no_grad():
            logits = model(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                use_cache=False,
            ).logits
        scores: NDArray[np.float32] = logits.squeeze(-1).float().cpu().numpy()
        return scores

    batches = FittingBatches(
        what="reward model's scores",
        item="response",
        size=batch_size,
        device=model.device,
        remedy="a shorter prompts.template",
        progress=progress,
    )
    found = np.empty(len(sequences), dtype=np.float32)
    # Alike lengths share a batch.
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for rows, scores in batches.map(order, scored):
        found[list(rows)] = scores
    return found


def train_reward_on_pairs(
    base_dir: Path,
    sft_adapter: Path,
    prompts: pd.DataFrame,
    pairs: pd.DataFrame,
    recipe: RewardRecipe,
    evaluation: EvaluationRecipe,
    *,
    seed: int,
    work_dir: Path,
    device: Device,
    progress: Progress = silent,
) -> tuple[Path, dict[str, Any]]:
    """Trains adapter and score head on prompt and response; returns their directory and facts.

    The loss is -log σ(r_chosen - r_rejected) (Bradley-Terry; Ouyang et al., 2022, eq. 1), without
    centring. ``facts["validation"]`` is ``None`` where no pair validates.

    Args:
        base_dir: a base model as ``base.prepare_base_model`` writes it.
        sft_adapter: adapter directory of SFT.
        prompts: ``schemas.PROMPTS``.
        pairs: ``schemas.PREFERENCE_PAIRS``; split 'train' trains, 'validation' validates.
        evaluation: the interval of the validation accuracy.
        work_dir: the trainer's own state lives here; name it by the version to be published.

    Raises:
        DataError: a pair's user is not in the pair's split, or no pair trains.
        RecipeError: an example does not fit ``recipe.max_length``.
        OutOfMemoryError: the device cannot hold even one pair.
    """
    split = split_pairs(prompts, pairs)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    train, validation = (
        tokenize_pairs(tokenizer, rows) for rows in (split.train, split.validation)
    )
    lengths = sequence_lengths([*train, *validation])
    require_fit(lengths, recipe.max_length, "reward")

    attempt = partial(
        _train,
        base_dir,
        sft_adapter,
        split,
        train,
        validation,
        evaluation=evaluation,
        seed=seed,
        work_dir=work_dir,
        device=device,
        progress=progress,
    )
    return train_on_pairs(
        attempt,
        recipe,
        section="reward",
        what="reward model",
        longest=max(lengths),
        work_dir=work_dir,
        device=device,
        progress=progress,
    )


def _train(
    base_dir: Path,
    sft_adapter: Path,
    split: SplitPairs,
    train: list[TokenizedPair],
    validation: list[TokenizedPair],
    recipe: RewardRecipe,
    *,
    evaluation: EvaluationRecipe,
    seed: int,
    work_dir: Path,
    device: Device,
    progress: Progress,
) -> tuple[Path, dict[str, Any]]:
    """One try, with micro batches as ``recipe`` says."""
    started = time.monotonic()
    dtype = usable_dtype(device, recipe.dtype)
    policy, tokenizer = load_policy(base_dir, [sft_adapter], dtype=dtype, device=device.torch)
    classifier = sequence_classifier(policy, tokenizer, seed=seed)
    # The trainer pads, and sets the model's pad id, by its tokenizer's.
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding_id(tokenizer))
    resume_from = last_complete_checkpoint(work_dir)

    config = RewardConfig(
        **trainer_settings(recipe, dtype, seed=seed, work_dir=work_dir, device=device),
        remove_unused_columns=False,  # TRL's own collator reads no prompt
    )
    # Only the leased card: the trainer would spread over all it sees.
    config._n_gpu = min(config.n_gpu, 1)
    trainer = _PairTrainer(
        model=classifier,
        args=config,
        data_collator=PairCollator(padding_id(tokenizer), is_fit(policy)),
        train_dataset=Dataset.from_list(train),
        processing_class=tokenizer,
        # peft adds the head, named `score`, to what a SEQ_CLS adapter trains and saves.
        peft_config=lora_config(recipe.lora, "SEQ_CLS"),
        callbacks=[ReportProgress("reward model", progress, recipe.batch_size)],
    )
    speed_up(trainer.model)
    trainer.remove_callback(PrinterCallback)  # prints every log line when tqdm is off
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    adapter_dir = save_adapter(trainer.model, work_dir / "adapter", base_dir.name)

    facts = training_facts(
        trainer,
        split,
        train,
        curves={"losses": "loss", "margins": "margin", "accuracies": "accuracy"},
        resume_from=resume_from,
        started=started,
        device=device,
    )
    facts["validation"] = None
    if validation:
        wholes = [_whole(example) for example in validation]
        sequences = [whole[answer] for answer in ("chosen_ids", "rejected_ids") for whole in wholes]
        chosen, rejected = _scores(
            trainer.model, sequences, batch_size=8, progress=progress
        ).reshape(2, -1)
        facts["validation"] = _validation_facts(
            split.validation["user_id"], chosen, rejected, evaluation, seed
        )
    return adapter_dir, facts


def _whole(example: TokenizedPair) -> TokenizedPair:
    """What the classifier reads: prompt and answer as one sequence."""
    return {
        answer: example["prompt_ids"] + example[answer] for answer in ("chosen_ids", "rejected_ids")
    }


def _validation_facts(
    user_ids: pd.Series,
    chosen: NDArray[np.float32],
    rejected: NDArray[np.float32],
    evaluation: EvaluationRecipe,
    seed: int,
) -> dict[str, Any]:
    """Share of pairs with r_chosen > r_rejected, averaged per user, then over users."""
    right = pd.Series(chosen > rejected, dtype="float64").groupby(user_ids.to_numpy()).mean()
    shares = right.to_numpy(dtype=np.float64)
    # Errors beside hits: the bootstrap gives a column of zeros an exact limit, so that neither
    # all wrong nor all right looks as if it were known for certain.
    mean, low, high = bootstrap_means(
        np.stack([shares, 1 - shares], axis=1), evaluation.resamples, seed, evaluation.confidence
    )
    return {
        "pairs": len(chosen),
        "users": len(right),
        "accuracy": float(mean[0]),
        "accuracy_low": float(min(low[0], 1 - high[1])),
        "accuracy_high": float(max(high[0], 1 - low[1])),
        "margin": float(np.mean(chosen - rejected)),
    }


def score_head(reward_dir: Path) -> torch.Tensor:
    """Weight of a published score head, [hidden] in float32.

    Raises:
        StoreError: the directory holds another stage's adapter, which has no score head.
    """
    weights = load_file(reward_dir / "adapter_model.safetensors")
    if _SCORE_KEY not in weights:
        raise StoreError(
            f"{reward_dir} holds an adapter without a score head: it is no reward model; "
            "pass the checkpoint of reward_model"
        )
    return weights[_SCORE_KEY][0].float()


def score_responses(
    base_dir: Path,
    sft_adapter: Path,
    reward_dir: Path,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    max_length: int,
    dtype: torch.dtype,
    device: Device,
    batch_size: int = 8,
) -> NDArray[np.float32]:
    """Scores of a published reward model for responses to prompts, [n].

    Raises:
        StoreError: ``reward_dir`` holds no reward model.
        RecipeError: prompt and response together are longer than ``max_length`` tokens.
    """
    score_head(reward_dir)  # peft would load another adapter and leave the head as it was drawn
    policy, tokenizer = load_policy(base_dir, [sft_adapter], dtype=dtype, device=device.torch)
    classifier = sequence_classifier(policy, tokenizer, seed=0)
    sequences = [
        prompt_ids(tokenizer, prompt) + completion_ids(tokenizer, prompt, response)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    require_fit([len(ids) for ids in sequences], max_length, "reward")
    model = PeftModel.from_pretrained(classifier, reward_dir)
    return _scores(model, sequences, batch_size)
