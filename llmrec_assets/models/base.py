"""The base model: from a hub id, a directory or a GGUF file to one safetensors directory.

What belongs here: obtaining a model and its tokenizer once and writing them in one form. What
does not: loading that form for training or generation (``loading``), publishing (the store).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrec_assets.ground.errors import ModelError
from llmrec_assets.ground.model_files import gguf_file, model_directory
from llmrec_assets.ground.recipes import BaseModelRecipe
from llmrec_assets.ground.sample_films import films
from llmrec_assets.models.tiny import tiny_llama, tiny_tokenizer


def prepare_base_model(recipe: BaseModelRecipe, destination: Path) -> tuple[Path, dict[str, Any]]:
    """Writes ``model.safetensors``, config, tokenizer and chat template into ``destination``.

    Args:
        recipe: where the model comes from.
        destination: an empty directory.

    Returns:
        ``destination`` and facts: label, number of parameters, vocabulary size, dtype.

    Raises:
        ModelError: the model cannot be had; the message says what to do.
    """
    if recipe.source == "tiny":
        tokenizer = tiny_tokenizer(film.title for film in films())
        model = tiny_llama(tokenizer, recipe.seed)
    else:
        model, tokenizer = _load(recipe)
    if tokenizer.chat_template is None:
        raise ModelError(
            f"{recipe.name} has no chat template: use an instruction-tuned model, or add a "
            "chat_template.jinja to its directory"
        )
    if tokenizer.pad_token_id is None:
        # Llama 3.2 ships without one but reserves a token for it.
        reserved = "<|finetune_right_pad_id|>"
        known = reserved in tokenizer.get_vocab()
        tokenizer.pad_token = reserved if known else tokenizer.eos_token
    model.to(getattr(torch, recipe.dtype))
    _forget_quantization(model)
    destination.mkdir(parents=True, exist_ok=True)
    # The machine's path to the source has no business in a published file.
    model.config._name_or_path = recipe.label
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    return destination, {
        "label": recipe.label,
        "source": recipe.source,
        "name": recipe.name,
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "dtype": recipe.dtype,
    }


def _load(recipe: BaseModelRecipe) -> tuple[Any, Any]:
    where, options = _where(recipe)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        # GGUF is unpacked in float32 and cast afterwards; the others load as they will be kept.
        dtype = torch.float32 if recipe.source == "gguf" else getattr(torch, recipe.dtype)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options)
    except Exception as error:
        # From nothing: what the hub client raises may quote request headers, and Dagster records
        # an error's cause.
        raise ModelError(_remedy(recipe, error)) from None
    return model, tokenizer


def _where(recipe: BaseModelRecipe) -> tuple[str, dict[str, Any]]:
    if recipe.source == "hub":
        # The hub client reads HF_TOKEN itself, and cleans it; passing it on would put it at risk of
        # standing in an error message.
        return recipe.name, {"revision": recipe.revision, "use_safetensors": True}
    if recipe.source == "directory":
        return str(model_directory(recipe)), {"local_files_only": True, "use_safetensors": True}
    file = gguf_file(recipe)
    return str(file.parent), {"gguf_file": file.name}


def _remedy(recipe: BaseModelRecipe, error: Exception) -> str:
    """What a person can do about a model that did not load. Never repeats a token."""
    text = f"{type(error).__name__}: {error}"
    if recipe.source != "hub":
        return f"base model {recipe.name} cannot be loaded: {text}"
    if any(sign in text for sign in ("401", "403", "gated", "Gated", "restricted")):
        given = "HF_TOKEN is set" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set"
        return (
            f"the hub refuses {recipe.name} ({given}): accept its licence on the model's page "
            "with your account, create a read token, and set it as HF_TOKEN in the environment "
            "of the run; or choose a recipe with an open model, such as `cpu`"
        )
    return (
        f"base model {recipe.name} cannot be fetched from the hub ({type(error).__name__}): "
        "check the network and the id; a copy on disk is used with source: directory"
    )


def _forget_quantization(model: Any) -> None:
    """A dequantised GGUF model still claims to be quantised, and ``save_pretrained`` refuses it."""
    model.hf_quantizer = None
    for name in ("quantization_method", "is_quantized"):
        if hasattr(model, name):
            delattr(model, name) if name in vars(model) else setattr(model, name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
