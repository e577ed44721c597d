"""PPO's four models in one: a shared base with an adapter each for policy, value and reward.

What belongs here: forward passes over prompts and responses. What does not: losses
(``ppo_losses``), sampling and the training loop (``ppo``).

The base is the merged SFT policy and never changes; the reference is that base with the adapters
off. Fresh adapters add exactly 0, so policy and reference start out equal. The model stays in eval
mode: with dropout on, PPO's ratio would compare two policies when it should compare one with
itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from llmrec_assets.ground.recipes import LoraRecipe
from llmrec_assets.models.fast_layers import chosen_log_probs, speed_up
from llmrec_assets.models.reward import score_head
from llmrec_assets.models.training import lora_config


@dataclass(frozen=True)
class TokenBatch:
    """b responses behind their prompts, the tensors of one forward pass.

    Rows are contiguous and padded on the right: attention is causal, so no response sees padding,
    positions count from 0 and no attention mask is needed (which keeps the fastest attention).

    ``input_ids`` [b, L] leave out each response's last token: nothing follows it. ``mask`` [b, T]
    marks the response tokens. The n marked tokens, row by row: they are ``targets`` [n], each
    predicted at (``rows``, ``columns``) [n]. That is also where its state has its value.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor

    @property
    def n_tokens(self) -> int:
        return len(self.targets)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """[n] to [b, T], 0 outside ``mask``."""
        return x.new_zeros(self.mask.shape).masked_scatter(self.mask, x)


def token_batch(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    width: int,
    device: torch.device,
) -> TokenBatch:
    """Lays out b prompts and their responses of 1 to ``width`` (T) tokens."""
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        mask[row, : len(response)] = True
        rows += [row] * len(response)
        columns += range(len(prompt) - 1, len(prompt) - 1 + len(response))
        targets += response
    sequences = [[*p, *r[:-1]] for p, r in zip(prompts, responses, strict=True)]
    return TokenBatch(
        input_ids=_pad(sequences, device),
        mask=mask.to(device),
        rows=torch.tensor(rows, device=device),
        columns=torch.tensor(columns, device=device),
        targets=torch.tensor(targets, device=device),
    )


def _pad(sequences: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    longest = max(map(len, sequences))
    # Any id would do: what stands here is never attended to.
    return torch.tensor([[*s, *[0] * (longest - len(s))] for s in sequences], device=device)


class PpoModel:
    """Forward passes of policy, reference, value and reward model over one base.

    Log-probabilities and entropies are those of the policy at ``temperature``, in nats: what is
    sampled is what is trained. Softmax, value and score are computed in float32.
    """

    def __init__(
        self,
        base: Any,
        lora: LoraRecipe,
        *,
        temperature: float,
        reward_dir: Path | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        """Draws the fresh adapters from torch's global generator.

        Args:
            base: a causal language model in eval mode, on its device.
            reward_dir: a reward model's adapter; None: ``scores`` is not used.
        """
        self._temperature = temperature
        self._layers = []
        if gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            self._layers = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
        self.peft = get_peft_model(base, lora_config(lora, "CAUSAL_LM"), adapter_name="policy")
        self.peft.add_adapter("value", lora_config(lora, "CAUSAL_LM"))
        if reward_dir is not None:
            self.peft.load_adapter(reward_dir, adapter_name="reward")
            self._score_head = score_head(reward_dir).to(base.device, torch.float32)
        self.peft.eval()
        for module in self.peft.modules():
            if isinstance(module, BaseTunerLayer):
                # Autocast casts. peft's way over float32 ends in the same bfloat16 numbers, but
                # keeps a copy of every layer's input for each adapter weight that reads it.
                module.cast_input_dtype_enabled = False
        speed_up(self.peft)
        self._base = base
        # From 0: the first values are the bias, whatever the state.
        self.value_head = torch.nn.Linear(base.config.hidden_size, 1, device=base.device)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)

    @property
    def device(self) -> torch.device:
        return self._base.device

    def policy_parameters(self) -> dict[str, torch.nn.Parameter]:
        return self._adapter_parameters("policy")

    def value_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The value adapter and its head."""
        head = {f"value_head.{n}": p for n, p in self.value_head.named_parameters()}
        return self._adapter_parameters("value") | head

    def _adapter_parameters(self, adapter: str) -> dict[str, torch.nn.Parameter]:
        return {n: p for n, p in self.peft.named_parameters() if f".{adapter}." in n}

    @contextmanager
    def sampling(self) -> Iterator[Any]:
        """The policy, ready to generate, as a language model of the libraries."""
        self._activate("policy", training=False)
        with self._autocast():
            yield self.peft

    def log_probs(self, batch: TokenBatch) -> torch.Tensor:
        """Policy's log-probability of every response token, [b, T]."""
        return self._log_probs("policy", batch)

    @torch.no_grad()
    def log_probs_and_entropies(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """``log_probs``, and the entropy of the distribution each token came from, [b, T]."""
        logits = self._logits("policy", batch)
        # As the steps compute it, to the last bit: the first ratio is 1.
        chosen = chosen_log_probs(logits, batch.targets, self._temperature)
        log_p = (logits.float() / self._temperature).log_softmax(-1)
        return batch.spread(chosen), batch.spread(-log_p.exp().mul_(log_p).sum(-1))

    @torch.no_grad()
    def reference_log_probs(self, batch: TokenBatch) -> torch.Tensor:
        """The SFT policy's log-probability of every response token, [b, T]."""
        return self._log_probs(None, batch)

    def values(self, batch: TokenBatch) -> torch.Tensor:
        """Value of the state each response token was chosen in, [b, T]."""
        hidden = self._hidden("value", batch.input_ids)[batch.rows, batch.columns]
        return batch.spread(self.value_head(hidden.float())[:, 0])

    @torch.no_grad()
    def scores(
        self, sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """The reward model's score of each sequence as read at each of its ``positions``."""
        hidden = self._hidden("reward", _pad(sequences, self.device)).float()
        scores = hidden @ self._score_head
        return [scores[row, list(at)].tolist() for row, at in enumerate(positions)]

    def _log_probs(self, adapter: str | None, batch: TokenBatch) -> torch.Tensor:
        logits = self._logits(adapter, batch)
        return batch.spread(chosen_log_probs(logits, batch.targets, self._temperature))

    def _logits(self, adapter: str | None, batch: TokenBatch) -> torch.Tensor:
        hidden = self._hidden(adapter, batch.input_ids)[batch.rows, batch.columns]
        with self._autocast():
            return self._base.get_output_embeddings()(hidden)

    def _hidden(self, adapter: str | None, input_ids: torch.Tensor) -> torch.Tensor:
        """Last hidden states [b, L, h]; the output layer is left out."""
        self._activate(adapter or "policy", training=torch.is_grad_enabled())
        off = nullcontext() if adapter else self.peft.disable_adapter()
        with off, self._autocast():
            return self._base.base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    def _activate(self, adapter: str, *, training: bool) -> None:
        self.peft.set_adapter(adapter, inference_mode=adapter == "reward")
        # A layer recomputes its activations in training mode only (and cannot generate then); what
        # is inside the layer stays in eval mode.
        for layer in self._layers:
            layer.training = training

    def _autocast(self) -> torch.autocast:
        """As the libraries' trainers do: a bfloat16 base with float32 adapters, in bfloat16."""
        bfloat16 = self._base.dtype == torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bfloat16)
