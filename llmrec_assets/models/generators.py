"""Who draws a policy's samples: our own token loop, or vLLM where it is installed.

What belongs here: the ``Generator`` that both are, and starting either for a policy. What does not:
the loop itself (``sampling``), what is sampled (``sampled``).

vLLM (Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", SOSP 2023) batches sequences of any length continuously, which pays where hundreds
are drawn on a GPU. It draws with noise of its own, seeded sample by sample with the same names: its
samples are other ones than the loop's, of the same distribution up to rounding.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from llmrec_assets.ground.errors import ModelError
from llmrec_assets.models.chat import stop_ids
from llmrec_assets.models.loading import load_policy
from llmrec_assets.models.memory import FittingBatches
from llmrec_assets.models.packed import pack
from llmrec_assets.models.sampling import Decoding, Sample, sample_rows

Engine = Literal["transformers", "vllm"]
Lists = Sequence[Sequence[int]]

#: Largest ranks of adapters that vLLM can be started for.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: Prompt tokens that vLLM computes in one step.
_TOKENS_AT_ONCE = 8192
#: vLLM's seeds are signed.
_SEEDS = 2**63


class Generator(Protocol):
    """Draws samples of one policy."""

    def sample(self, prompts: Lists, streams: Lists, decoding: Decoding) -> list[list[Sample]]:
        """One sample per stream of each prompt, in their order.

        Args:
            prompts: token ids, none empty.
            streams: per prompt the names of its samples' noise (``sampling.stream``).
        """
        ...


@dataclass(frozen=True)
class LoopGenerator:
    """``sampling.sample_rows`` on a model in this process."""

    model: Any
    stops: Sequence[int]
    pad: int
    rows: FittingBatches

    def sample(self, prompts: Lists, streams: Lists, decoding: Decoding) -> list[list[Sample]]:
        return sample_rows(
            self.model,
            prompts,
            streams,
            decoding,
            stops=self.stops,
            pad=self.pad,
            rows=self.rows,
        )


@dataclass(frozen=True)
class VllmGenerator:
    """vLLM's offline engine; ``lora`` is its ``LoRARequest``, or None."""

    llm: Any
    lora: Any
    stops: Sequence[int]

    def sample(self, prompts: Lists, streams: Lists, decoding: Decoding) -> list[list[Sample]]:
        from vllm import SamplingParams

        asked, parameters = [], []
        for ids, keys in zip(prompts, streams, strict=True):
            for key in keys:
                asked.append({"prompt_token_ids": list(ids)})
                parameters.append(
                    SamplingParams(
                        temperature=decoding.temperature if decoding.do_sample else 0.0,
                        top_k=decoding.top_k if decoding.do_sample else 0,
                        top_p=decoding.top_p if decoding.do_sample else 1.0,
                        max_tokens=decoding.max_new_tokens,
                        seed=key % _SEEDS,
                        stop_token_ids=list(self.stops),
                        ignore_eos=True,  # ``stops`` has every end there is
                        detokenize=False,
                    )
                )
        if not asked:
            return [[] for _ in prompts]
        try:
            found = self.llm.generate(asked, parameters, lora_request=self.lora, use_tqdm=False)
        except Exception as error:
            raise ModelError(
                f"vLLM failed while it sampled ({error}); its log says more. The batches made so "
                "far are kept; write sampling.engine: transformers to sample without it"
            ) from error
        samples = iter([_sample(output.outputs[0], self.stops) for output in found])
        return [[next(samples) for _ in keys] for keys in streams]


def _sample(answer: Any, stops: Sequence[int]) -> Sample:
    tokens = list(answer.token_ids)
    ended = answer.finish_reason == "stop" and tokens and tokens[-1] in stops
    return Sample(tokens[:-1], tokens[-1]) if ended else Sample(tokens, None)


@contextmanager
def open_generator(
    engine: Engine,
    base_dir: Path,
    adapters: Sequence[Path],
    *,
    dtype: torch.dtype,
    device: torch.device,
    rows: FittingBatches,
    longest: int,
    work_dir: Path,
) -> Iterator[Generator]:
    """The engine's generator for the policy of ``loading.load_policy``.

    Args:
        rows: samples at once of our own loop; vLLM finds their number itself.
        longest: tokens of the longest prompt and answer together; bounds vLLM's memory.
        work_dir: vLLM reads the merged weights from there; they go with the generator.

    Raises:
        ModelError: vLLM is not installed, or cannot start.
    """
    if engine == "vllm":
        with _vllm_generator(
            base_dir, adapters, dtype=dtype, device=device, longest=longest, work_dir=work_dir
        ) as generator:
            yield generator
        return
    model, tokenizer = load_policy(base_dir, adapters, dtype=dtype, device=device)
    pack(model)
    yield LoopGenerator(model, stop_ids(tokenizer, model), tokenizer.pad_token_id, rows)


@contextmanager
def _vllm_generator(
    base_dir: Path,
    adapters: Sequence[Path],
    *,
    dtype: torch.dtype,
    device: torch.device,
    longest: int,
    work_dir: Path,
) -> Iterator[Generator]:
    """vLLM within this process: one of its own would outlive a kill, and hold the device.

    The first adapter is merged in float32 and cast once, the second is live.
    """
    # Read when vLLM is imported. It reports usage to its makers unless told not to.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from vllm import LLM
        from vllm.lora.request import LoRARequest
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ModelError(
            f"the recipe asks for sampling.engine vllm, which cannot be imported ({error}): pip "
            "install -e '.[vllm]' in the project's directory, or write engine: transformers"
        ) from error
    if current_platform.device_type != device.type:  # its build decides, not we
        theirs = current_platform.device_type or "no device of this machine"
        raise ModelError(
            f"vLLM as installed computes on {theirs}, this run on {device.type}: install the build "
            "for it, or write sampling.engine: transformers"
        )
    lora, options = None, dict[str, Any]()
    for adapter in adapters[1:]:
        lora = LoRARequest("policy", 1, str(adapter))
        options = {"enable_lora": True, "max_loras": 1, "max_lora_rank": _vllm_rank(adapter)}
    weights = work_dir / "weights"
    shutil.rmtree(weights, ignore_errors=True)  # of an attempt that was killed
    try:
        cpu = torch.device("cpu")
        model, tokenizer = load_policy(base_dir, adapters[:1], dtype=dtype, device=cpu)
        stops = stop_ids(tokenizer, model)
        model.save_pretrained(weights)
        del model
        try:
            llm = LLM(
                str(weights),
                skip_tokenizer_init=True,  # token ids go in and come out
                load_format="safetensors",
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=longest,
                max_num_batched_tokens=max(longest, _TOKENS_AT_ONCE),
                enable_chunked_prefill=False,  # on a CPU it fails where seeds are given
                enable_prefix_caching=True,  # a prompt is computed once for all its samples
                generation_config="vllm",  # every sampling parameter is ours
                seed=0,
                **options,
            )
        except Exception as error:
            raise ModelError(
                f"vLLM could not start ({error}); its log says more. Write sampling.engine: "
                "transformers to sample without it"
            ) from error
        try:
            yield VllmGenerator(llm, lora, stops)
        finally:
            llm.llm_engine.engine_core.shutdown()
    finally:
        shutil.rmtree(weights, ignore_errors=True)


def _vllm_rank(adapter: Path) -> int:
    """The smallest rank vLLM can be started for that holds the adapter's."""
    rank = int(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"])
    fitting = [most for most in _VLLM_RANKS if most >= rank]
    if not fitting:
        raise ModelError(
            f"{adapter.name} has rank {rank}, vLLM takes at most {_VLLM_RANKS[-1]}: write engine: "
            "transformers"
        )
    return fitting[0]
