"""What a published version was made of, by what and where: the record that lineage reads.

What belongs here: the record, and reading it back from a table's file or a checkpoint's manifest.
What does not: what code and machine are at work (``surroundings``), which inputs a step loaded
(``orchestration.provenance``), walking from record to record (``lineage``).

The record is no part of any version: two machines that make the same table publish the same
version. A table that is published again with the same content shows its latest run. No host name is
recorded, and a path only where the recipe names its base model by one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmrec_assets.ground.errors import StoreError
from llmrec_assets.ground.schemas import SCHEMAS
from llmrec_assets.ground.store import PROVENANCE, Store, read_manifest

#: Raised when the code of a stage changes what it produces. Part of every checkpoint's version.
CODE_VERSION = "3"


@dataclass(frozen=True)
class Input:
    """One version that was read."""

    partition: str
    version: str


@dataclass(frozen=True)
class Provenance:
    """How one version came about. ``None``: not recorded (a version from before the record), or
    there is none (``recipe`` and ``seed`` of what depends on data alone).

    ``inputs``: by asset. ``recipe``: all its values, as used. ``commit``: of the project's
    checkout, with ``-dirty`` where files differ from it.
    """

    inputs: Mapping[str, Input]
    run_id: str | None = None
    made_at: str | None = None
    recipe: Mapping[str, Any] | None = None
    seed: int | None = None
    code: str | None = None
    commit: str | None = None
    libraries: Mapping[str, str] | None = None
    machine: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; ``from_json`` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Provenance:
        """Reads ``to_json``; names that a later version of the project added are ignored."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        inputs = {name: Input(**given) for name, given in known.pop("inputs", {}).items()}
        return cls(inputs, **known)


def read_provenance(store: Store, asset: str, partition: str, version: str) -> Provenance | None:
    """The record of a published version; ``None`` for a table from before the record.

    A manifest from before it still names run, seed, code and, of a training, libraries and
    threads; which versions it was made from stands in its determinants.

    Raises:
        StoreError: the version is not kept, or its file or manifest is damaged.
    """
    if asset not in SCHEMAS:
        return _of_manifest(read_manifest(store.checkpoint_path(asset, partition, version)))
    path = store.table_path(asset, partition, version)
    if not path.exists():
        raise StoreError(f"{asset} for {partition}: version {version} is not kept any more")
    try:
        with path.open("rb") as file:
            metadata = pq.read_metadata(file).metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{path} is damaged ({error}): materialize {asset} again") from error
    recorded = metadata.get(PROVENANCE.encode())
    return None if recorded is None else Provenance.from_json(json.loads(recorded))


def _of_manifest(manifest: Mapping[str, Any]) -> Provenance:
    if PROVENANCE in manifest:
        return Provenance.from_json(manifest[PROVENANCE])
    made_from, facts = manifest["determinants"], manifest["facts"]
    return Provenance(
        inputs={},
        run_id=facts.get("run_id"),
        made_at=manifest.get("published_at"),
        seed=made_from.get("seed"),
        code=made_from.get("code"),
        libraries=facts.get("libraries"),
        machine={"threads": facts["threads"]} if "threads" in facts else None,
    )
