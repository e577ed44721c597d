"""Recipes: every hyperparameter stands once, in a committed YAML file under ``recipes/``.

What belongs here: the frozen, validated types a recipe is read into. What does not: data-set
choice (the other partition) and run config (``force`` and a seed override, nothing else).
Paper values are in ``recipes/paper.yaml``.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from llmrec_assets.ground.errors import RecipeError

#: ``LLMREC_RECIPES_DIR`` names another one: a reproduction runs with the recorded recipe.
RECIPES_DIR = Path(
    os.environ.get("LLMREC_RECIPES_DIR") or Path(__file__).resolve().parent.parent / "recipes"
)

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Frozen; an unknown key is an error, so a typo in a recipe cannot pass silently."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SplitRecipe(Section):
    """User split by a seeded stable hash."""

    train: Share = 0.70
    validation: Share = 0.15
    test: Share = 0.15

    @model_validator(mode="after")
    def _sums_to_one(self) -> SplitRecipe:
        total = self.train + self.validation + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"train + validation + test = {round(total, 9)}, expected 1")
        return self


class WindowsPerUser(Section):
    """How many valid cut-offs are drawn per user of each split (paper: 1)."""

    train: Count = 1
    validation: Count = 1
    test: Count = 1


class WindowRecipe(Section):
    """Interaction windows (paper §3.2).

    ``protocol``: ``user-split`` is the paper's; ``temporal`` keeps the user split and adds a
    global time T (``splits.temporal_split_time``): training windows end, ground truth included, at
    or before T, and validation and test windows are cut off at or after it. T is the time by
    which ``temporal_quantile`` of all ratings were made, or ``temporal_time`` (Unix seconds).
    """

    window_size: Count = 10
    balance: Literal["either", "both"] = "either"
    min_per_class: Annotated[int, Field(ge=0)] = 5
    min_ground_truth: Count = 1
    top_k: Count = 5
    liked_min: Annotated[int, Field(ge=2, le=5)] = 3
    windows_per_user: WindowsPerUser = WindowsPerUser()
    protocol: Literal["user-split", "temporal"] = "user-split"
    temporal_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.8
    temporal_time: int | None = None

    @model_validator(mode="after")
    def _ground_truth_fits(self) -> WindowRecipe:
        if self.min_ground_truth > self.top_k:
            raise ValueError(
                f"min_ground_truth {self.min_ground_truth} is larger than top_k {self.top_k}"
            )
        return self


class PromptRecipe(Section):
    """Which template asks (paper Figure 2), and under which titles.

    ``titles: invented`` is the anonymised control (``ground.catalogue``).
    """

    template: Literal["figure2", "compact"] = "figure2"
    max_per_class: Count = 5
    titles: Literal["real", "invented"] = "real"


class BaseModelRecipe(Section):
    """Where the base model comes from; converted once to safetensors.

    ``source``: ``hub`` (``name`` is a hub id), ``directory`` (``name`` is a path), ``gguf``
    (``name`` is a path, or ``package:FILE`` for a GGUF file inside an installed package) or
    ``tiny`` (a seeded random Llama with a tokenizer trained on the catalogue, for tests).
    """

    source: Literal["hub", "directory", "gguf", "tiny"]
    name: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    label: str
    seed: int = 0


class LoraRecipe(Section):
    """LoRA adapter (Hu et al., 2021)."""

    r: Count
    alpha: Count
    dropout: Share = 0.0
    target_modules: str = "all-linear"


class SftRecipe(Section):
    """Supervised fine-tuning (paper §4)."""

    lora: LoraRecipe
    learning_rate: Annotated[float, Field(gt=0)]
    batch_size: Count
    micro_batch_size: Count
    epochs: Annotated[float, Field(gt=0)]
    max_length: Count = 1024
    warmup_ratio: Share = 0.0
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_examples: Count | None = None
    save_steps: Count = 50
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    @model_validator(mode="after")
    def _batches_divide(self) -> SftRecipe:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of "
                f"micro_batch_size {self.micro_batch_size}"
            )
        return self


class SamplingRecipe(Section):
    """Sampled responses to the training and validation prompts (paper §3.4).

    ``windows_per_user``, ``max_prompts`` and ``max_validation_prompts`` bound what is sampled: the
    first windows of every user, then the first prompts of each split by (user, window). ``engine``:
    what draws them; ``vllm`` (an extra to install) pays where hundreds are drawn on a GPU, and
    draws other samples of the same distribution.
    """

    engine: Literal["transformers", "vllm"] = "transformers"
    n: Annotated[int, Field(ge=2)] = 5
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Count = 128
    max_draws: Count = 3
    prompts_per_batch: Count = 8
    windows_per_user: Count | None = None
    max_prompts: Count | None = None
    max_validation_prompts: Count | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    @model_serializer(mode="wrap")
    def _engine_where_it_matters(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Versions are hashes of this: samples drawn before there were engines keep theirs."""
        values: dict[str, object] = handler(self)
        if self.engine == "transformers":
            values.pop("engine", None)
        return values


class PreferenceRecipe(Section):
    """Preference pairs by NDCG@k (paper §3.4).

    ``ground_truth_pairs`` is beyond the paper: where all samples of a prompt score zero, the ground
    truth is preferred to one of them. ``max_pairs_per_prompt`` keeps the widest score gaps.
    """

    ground_truth_pairs: bool = False
    max_pairs_per_prompt: Count | None = None
    max_pairs: Count | None = None


class PairTrainingRecipe(Section):
    """What DPO and the reward model share: one LoRA training over preference pairs."""

    lora: LoraRecipe
    learning_rate: Annotated[float, Field(gt=0)]
    batch_size: Count = 1
    micro_batch_size: Count = 1
    epochs: Annotated[float, Field(gt=0)]
    max_length: Count = 1024
    warmup_ratio: Share = 0.0
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    save_steps: Count = 25
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    @model_validator(mode="after")
    def _batches_divide(self) -> PairTrainingRecipe:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of "
                f"micro_batch_size {self.micro_batch_size}"
            )
        return self


class DpoRecipe(PairTrainingRecipe):
    """Direct preference optimisation (paper §3.4; β is not published)."""

    beta: Annotated[float, Field(gt=0)] = 0.1


class RewardRecipe(PairTrainingRecipe):
    """The reward model, a sequence classifier of prompt and response (paper §3.5)."""


class RlhfRecipe(Section):
    """RLHF (paper §3.5, equation 1).

    ``method``: ``ppo`` is ours; ``grpo`` and ``rloo`` are TRL's and take ``reward: ndcg``.
    ``reward``: ``model`` (the trained reward model) or ``ndcg`` (measured NDCG@k, beyond the
    paper). ``granularity``: the score stands at the end of the response, or at each listed item's
    closing quote. ``kl_target`` ends a batch's epochs once the new policy is that far (mean nats a
    token) from the one that sampled; ``kl_stop`` ends the training once the policy is that far
    (mean nats a response) from the SFT reference.
    """

    method: Literal["ppo", "grpo", "rloo"] = "ppo"
    reward: Literal["model", "ndcg"] = "model"
    granularity: Literal["response", "item"] = "response"
    lora: LoraRecipe
    learning_rate: Annotated[float, Field(gt=0)] = 1.0e-5
    value_learning_rate: Annotated[float, Field(gt=0)] = 1.0e-4
    batches: Count = 8
    batch_size: Count = 16
    micro_batch_size: Count = 4
    minibatches: Count = 1
    epochs_per_batch: Count = 4
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.1
    value_clip: Annotated[float, Field(gt=0)] = 0.2
    gae_lambda: Share = 0.95
    gamma: Share = 1.0
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.05
    kl_target: Annotated[float, Field(gt=0)] = 0.05
    kl_stop: Annotated[float, Field(gt=0)] = 25.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    missing_end_penalty: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    max_new_tokens: Count = 128
    samples_per_prompt: Count = 1
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    @model_validator(mode="after")
    def _consistent(self) -> RlhfRecipe:
        if self.batch_size % (self.minibatches * self.micro_batch_size):
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of minibatches {self.minibatches} x "
                f"micro_batch_size {self.micro_batch_size}"
            )
        if self.batch_size % self.samples_per_prompt:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of "
                f"samples_per_prompt {self.samples_per_prompt}"
            )
        if self.lora.dropout > 0:
            raise ValueError("lora.dropout must be 0: with it the ratio compares two policies")
        if self.method != "ppo" and self.reward != "ndcg":
            raise ValueError(f"method {self.method} is offered with reward ndcg only")
        if self.method != "ppo" and self.granularity != "response":
            raise ValueError(f"method {self.method} scores whole responses: granularity response")
        if self.method != "ppo" and self.samples_per_prompt < 2:
            raise ValueError(f"method {self.method} compares samples: samples_per_prompt >= 2")
        return self


DecodingName = Literal["free", "constrained", "ranked"]
#: The row of ``candidates: ease``: EASE proposes films, the language model orders them.
HYBRID = "ranked-ease"
_SAMPLED = {"max_new_tokens", "do_sample", "temperature", "top_k", "top_p"}
_PROPOSED = {"candidates", "candidates_per_prompt"}


class GenerationRecipe(Section):
    """How responses to the test prompts are generated; always passed in full to ``generate``.

    ``decodings``: ``free`` text (the paper's); ``constrained``, a list of distinct unseen titles
    drawn under a mask; ``ranked``, the most probable unseen titles by a search of ``beams`` beams.
    Each is rows of its own in the metric table. ``candidates: ease`` adds the hybrid
    ``ranked-ease``: the model ranks EASE's ``candidates_per_prompt`` best films.
    """

    decodings: Annotated[tuple[DecodingName, ...], Field(min_length=1)] = ("free",)
    beams: Count = 40
    candidates: Literal["none", "ease"] = "none"
    candidates_per_prompt: Count = 40
    max_new_tokens: Count = 128
    batch_size: Count = 16
    do_sample: bool = False
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    @model_validator(mode="after")
    def _decodings_are_offered(self) -> GenerationRecipe:
        if len(set(self.decodings)) != len(self.decodings):
            raise ValueError(f"decodings {', '.join(self.decodings)} name one twice")
        return self

    @property
    def rows(self) -> tuple[str, ...]:
        """Every way in which the test prompts are answered, as the metric table names it."""
        return (*self.decodings, *([HYBRID] if self.candidates == "ease" else []))

    def settings(self, row: str) -> dict[str, object]:
        """The values that the answers of one of ``rows`` depend on."""
        unused = {
            "free": {"beams"} | _PROPOSED,
            "constrained": {"beams", "max_new_tokens"} | _PROPOSED,
            "ranked": _SAMPLED | _PROPOSED,
            HYBRID: {"beams"} | _SAMPLED,
        }
        settings = self.model_dump(exclude={"decodings"} | unused[row])
        # a version is a hash of these: the answers there are say so
        return settings | ({"candidates": "none"} if row == "ranked" else {})


class GroundingRecipe(Section):
    """``ladder`` refuses below ``threshold`` (0 to 100); ``paper``, plain WRatio, never refuses.

    The default threshold is the one that ``bench/grounding`` chooses.
    """

    method: Literal["ladder", "paper"] = "ladder"
    threshold: Annotated[float, Field(ge=0, le=100)] = 88.0


Grid = Annotated[tuple[Count, ...], Field(min_length=1)]
PositiveGrid = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
#: Which events are the implicit feedback: those with a liked rating, or all that were rated.
FeedbackGrid = Annotated[tuple[Literal["liked", "rated"], ...], Field(min_length=1)]


class ItemToItemRecipe(Section):
    """Grid that they share: what counts as feedback, and how many of the latest films are asked
    with (taste moves: a whole history ranks worse than its end)."""

    feedback: FeedbackGrid = ("liked", "rated")
    last: Grid = (3, 5, 10, 1000)


class ItemKnnRecipe(ItemToItemRecipe):
    """Grid of ItemKNN (Deshpande & Karypis, 2004): neighbours a film keeps, neighbours scored."""

    save_nbrs: Grid = (50, 1000)
    max_nbrs: Grid = (20, 100)


class EaseRecipe(ItemToItemRecipe):
    """Grid of EASE (Steck, 2019): the L2 penalty."""

    regularization: PositiveGrid = (300.0, 1000.0, 3000.0, 10000.0)


class AlsRecipe(ItemToItemRecipe):
    """Grid of implicit ALS (Hu, Koren & Volinsky, 2008)."""

    embedding_size: Grid = (32, 64)
    regularization: PositiveGrid = (1.0, 10.0)
    weight: PositiveGrid = (10.0,)
    epochs: Count = 10


class SasrecRecipe(Section):
    """SASRec; the number of steps, a multiple of ``eval_steps`` up to ``steps``, is tuned."""

    embedding_size: Count = 64
    blocks: Count = 2
    heads: Count = 1
    max_length: Count = 50
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    learning_rate: Annotated[float, Field(gt=0)] = 1.0e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Count = 32
    steps: Count = 1500
    eval_steps: Count = 100

    @model_validator(mode="after")
    def _consistent(self) -> SasrecRecipe:
        if self.steps % self.eval_steps:
            raise ValueError(f"steps {self.steps} is no multiple of eval_steps {self.eval_steps}")
        if self.embedding_size % self.heads:
            raise ValueError(
                f"embedding_size {self.embedding_size} is no multiple of heads {self.heads}"
            )
        return self


class BaselinesRecipe(Section):
    """Classical recommenders. What is a grid is tuned on validation windows by NDCG@k.

    ``causal_grid_points``: times at which the time-causal variants are fitted anew.
    """

    itemknn: ItemKnnRecipe = ItemKnnRecipe()
    ease: EaseRecipe = EaseRecipe()
    als: AlsRecipe = AlsRecipe()
    sasrec: SasrecRecipe = SasrecRecipe()
    causal_grid_points: Count = 8


class EvaluationRecipe(Section):
    """Intervals of the metric table."""

    resamples: Count = 10_000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    max_test_users: Count | None = None


class PromotionRecipe(Section):
    """Which policy of the recipe challenges the champion of its data set (``ground.promotion``).

    ``decoding``: how validation users are answered, and how the champion then serves. ``margin``:
    the loss of NDCG@k that the paired interval must exclude, in [0, 1].
    """

    stage: Literal["sft", "dpo", "rlhf"] = "sft"
    decoding: DecodingName = "ranked"
    margin: Share = 0.01


class ProbeRecipe(Section):
    """Memorisation probes of the base model (``ground.memorisation``); ``n`` questions each."""

    n: Count = 100
    context_rows: Count = 5
    shots: Count = 3


class LeaveLastOutRecipe(Section):
    """Leave-last-out over all films; each recommender's setting is chosen on the last film but
    one. The settings are ours."""

    min_interactions: Annotated[int, Field(ge=3)] = 5
    ks: Annotated[tuple[Count, ...], Field(min_length=1)] = (5, 10)
    knn_neighbours: tuple[Count, ...] = (20, 100)
    ease_regularization: tuple[Annotated[float, Field(gt=0)], ...] = (100.0, 300.0, 1000.0)


class Recipe(Section):
    """One recipe file, validated. Frozen: a recipe is a value."""

    name: str
    description: str
    seed: int = 0
    expected_peak_memory_gb: Annotated[float, Field(gt=0)]
    splits: SplitRecipe = SplitRecipe()
    windows: WindowRecipe = WindowRecipe()
    prompts: PromptRecipe = PromptRecipe()
    base_model: BaseModelRecipe
    sft: SftRecipe
    sampling: SamplingRecipe = SamplingRecipe()
    preferences: PreferenceRecipe = PreferenceRecipe()
    dpo: DpoRecipe
    reward: RewardRecipe
    rlhf: RlhfRecipe
    #: Data sets whose ``make run`` goes past SFT; the paper stops there on ML-1M.
    aligned_datasets: tuple[Literal["sample", "ml-100k", "ml-1m"], ...] = ("sample", "ml-100k")
    generation: GenerationRecipe = GenerationRecipe()
    grounding: GroundingRecipe = GroundingRecipe()
    baselines: BaselinesRecipe = BaselinesRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    promotion: PromotionRecipe = PromotionRecipe()
    probes: ProbeRecipe = ProbeRecipe()
    leave_last_out: LeaveLastOutRecipe = LeaveLastOutRecipe()

    @model_validator(mode="after")
    def _lists_can_be_filled(self) -> Recipe:
        ranked = "ranked" in (*self.generation.decodings, self.promotion.decoding)
        if ranked and self.generation.beams < self.windows.top_k:
            raise ValueError(
                f"generation.beams {self.generation.beams} cannot fill lists of windows.top_k "
                f"{self.windows.top_k}"
            )
        proposed = self.generation.candidates_per_prompt
        if HYBRID in self.generation.rows and proposed < self.windows.top_k:
            raise ValueError(
                f"generation.candidates_per_prompt {proposed} cannot fill lists of windows.top_k "
                f"{self.windows.top_k}"
            )
        return self


class _Loader(yaml.SafeLoader):
    """A key that stands twice in a mapping is an error: one value would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} stands twice", node.value[position][0].start_mark
                )
        return super().construct_mapping(node, deep)


def recipe_names(directory: Path = RECIPES_DIR) -> list[str]:
    """Names of the recipe files, sorted; these are the keys of the ``recipe`` partition."""
    return sorted(path.stem for path in directory.glob("*.yaml"))


@cache
def load_recipe(name: str, directory: Path = RECIPES_DIR) -> Recipe:
    """Reads and validates ``<directory>/<name>.yaml``.

    Raises:
        RecipeError: the file is missing, is no YAML mapping, or a value is out of its range;
            the message names the file and every offending key.
    """
    path = directory / f"{name}.yaml"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not path.is_file():
        raise RecipeError(
            f"no recipe named {name!r}: known recipes are {', '.join(recipe_names(directory))}"
        )
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path.name} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path.name}: expected a mapping of sections at the top")
    if raw.setdefault("name", name) != name:
        raise RecipeError(f"{path.name}: name is {raw['name']!r}, expected {name!r} (the file's)")
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise RecipeError(f"{path.name} has unusable values:\n" + "\n".join(lines)) from error
