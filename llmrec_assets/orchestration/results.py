"""What an asset returns: its value, its data version and metadata a person can read.

What belongs here: the shape of ``MaterializeResult``s shared by all assets, and of the tables they
take. What does not: any number itself.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import pyarrow as pa

from llmrec_assets.ground.column_lineage import expanded, sources
from llmrec_assets.ground.lineage import trace
from llmrec_assets.ground.plots import line_plot
from llmrec_assets.ground.schemas import SCHEMAS
from llmrec_assets.ground.store import Store, builder_lock, checkpoint_version, read_manifest
from llmrec_assets.ground.tables import conform, content_version
from llmrec_assets.orchestration.config import ForceConfig
from llmrec_assets.orchestration.provenance import lineage_metadata, provenance_of_step
from llmrec_assets.orchestration.waiting import Holder, described, holding

if TYPE_CHECKING:
    from pandas import DataFrame as Frame
else:
    #: A table as an asset's input. Dagster reads annotations when it loads the definitions, which
    #: does without pandas; the IO manager gives a frame of the declared columns, or fails.
    Frame = Any

_PREVIEW_ROWS = 5

#: What a table asset returns: a table that conforms to its declared schema.
TableResult = dg.MaterializeResult[pa.Table]
#: What an asset with checks yields: they first, then the table or the checkpoint.
CheckedResult = Iterator[dg.AssetCheckResult | dg.MaterializeResult]


def table_columns(asset: str) -> dg.TableSchema:
    """The declared schema as Dagster shows it, with what each column is computed from: the open
    source UI takes column lineage and does not draw it."""
    made_from = sources(asset)
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                field.name,
                type=str(field.type),
                description=(field.metadata or {}).get(b"description", b"").decode()
                + (
                    f" [from {', '.join(made_from[field.name])}]" if field.name in made_from else ""
                ),
                constraints=dg.TableColumnConstraints(nullable=field.nullable),
            )
            for field in SCHEMAS[asset]
        ]
    )


def column_lineage(asset: str) -> dg.TableColumnLineage:
    """What each derived column is computed from, as Dagster keeps it."""
    return dg.TableColumnLineage(
        {
            column: [
                dg.TableColumnDep(asset_key=dg.AssetKey(table), column_name=name)
                for table, name in expanded(made_from)
            ]
            for column, made_from in sources(asset).items()
        }
    )


def table_result(
    asset: str, frame: Frame, metadata: Mapping[str, Any] | None = None
) -> TableResult:
    """A table asset's result. The data version is the hash of the content, so that automation
    sees what changed and not what merely ran."""
    from llmrec_assets.ground.report import markdown_table

    table = conform(frame, SCHEMAS[asset], asset)
    return dg.MaterializeResult(
        asset_key=asset,
        value=table,
        data_version=dg.DataVersion(content_version(table)),
        metadata={
            "dagster/row_count": len(frame),
            "dagster/column_lineage": column_lineage(asset),
            "preview": dg.MetadataValue.md(markdown_table(frame.head(_PREVIEW_ROWS))),
            **(metadata or {}),
        },
    )


def checked_table_result(
    asset: str,
    frame: Frame,
    problems: Mapping[str, Sequence[str]],
    metadata: Mapping[str, Any] | None = None,
) -> CheckedResult:
    """Blocking checks first, the table after: a table with a problem is never published, so the
    previous materialization stays in force.

    Args:
        problems: check name → what it found; empty means passed.
    """
    yield from blocking_checks(asset, problems)
    yield table_result(asset, frame, metadata)


def blocking_checks(
    asset: str, problems: Mapping[str, Sequence[str]]
) -> Iterator[dg.AssetCheckResult]:
    """One check result per name; what comes after is not reached when one failed.

    Raises:
        dg.Failure: a check found something.
    """
    for name, found in problems.items():
        yield dg.AssetCheckResult(
            check_name=name,
            passed=not found,
            severity=dg.AssetCheckSeverity.ERROR,
            metadata={"problems": len(found), "first": "\n".join(found[:10]) or "none"},
        )
    for name, found in problems.items():
        if found:
            raise dg.Failure(
                f"{asset} is not published, check {name} failed: {found[0]}"
                + (f" (and {len(found) - 1} more)" if len(found) > 1 else ""),
                allow_retries=False,
            )


def checkpoint_result(
    context: dg.AssetExecutionContext,
    store: Store,
    config: ForceConfig,
    determinants: Mapping[str, Any],
    build: Callable[[Path], tuple[Path, dict[str, Any]]],
    describe: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    check: Callable[[Mapping[str, Any]], Mapping[str, Sequence[str]]] | None = None,
) -> CheckedResult:
    """Publishes what ``build`` makes, or reuses an intact version that is already published.

    Args:
        determinants: what the version is the hash of.
        build: makes the files in the given work directory; returns their directory and facts
            (JSON values) for the manifest.
        describe: facts → metadata.
        check: facts → problems by blocking check; with one, nothing becomes current.
    """
    asset, partition = context.asset_key.path[-1], context.partition_key
    version = checkpoint_version(asset, determinants)
    with one_builder(store, asset, partition, context.log.info):
        intact = store.find_intact(asset, partition, version)
        if intact is not None:
            # Left by a kill between publishing and tidying up: a forced attempt must not resume it.
            store.remove_work(store.work_directory(asset, partition, version))
        found = None if config.force else intact
        if found is None:
            work = store.work_directory(asset, partition, version)
            with store.writing():
                files, facts = build(work)
            if check is not None:
                yield from blocking_checks(asset, check(facts))
            path = store.publish_checkpoint(
                asset,
                partition,
                version,
                files,
                determinants=determinants,
                facts={**facts, "run_id": context.run_id},
                provenance=provenance_of_step(),
            )
            store.remove_work(work)
            context.log.info(f"published {asset} version {path.name}")
        else:
            path = found
            if check is not None:
                yield from blocking_checks(asset, check(read_manifest(path)["facts"]))
            store.adopt(asset, partition, path.name)
            context.log.info(f"{asset} version {path.name} is already published, intact: reused")
    manifest = read_manifest(path)
    size = sum(fact["bytes"] for fact in manifest["files"].values())
    yield dg.MaterializeResult(
        value=path,
        data_version=dg.DataVersion(path.name),
        # In the order a reader asks: what came out, where it lies, where it comes from.
        metadata={
            "reused": found is not None,
            **describe(manifest["facts"]),
            "path": dg.MetadataValue.path(str(path)),
            "megabytes": round(size / 1e6, 3),
            "published_at": manifest["published_at"],
            **lineage_metadata(trace(store, asset, partition, path.name)),
            "determinants": dg.MetadataValue.json(manifest["determinants"]),
        },
    )


@contextlib.contextmanager
def one_builder(
    store: Store, asset: str, partition: str, say: Callable[[str], None]
) -> Iterator[None]:
    """One process at a time builds an asset's partition: two would share a work directory. The
    second then finds the version published. A dead builder's lock is free."""
    path = builder_lock(store, asset, partition)
    path.parent.mkdir(parents=True, exist_ok=True)

    def tell(holder: Holder | None, waited: float) -> None:
        say(
            f"another process is making {asset} for {partition}: waiting for it ({waited:.0f} s so "
            f"far), {described(holder)}"
        )

    run_id = dg.AssetExecutionContext.get().run_id
    with holding(path, f"{asset} {partition}", tell, run_id=run_id, poll_seconds=0.5):
        yield


def curve(points: Sequence[Sequence[float]], x: str, y: str) -> dg.MetadataValue:
    """A line plot as an inline picture."""
    return picture(line_plot([(p[0], p[1]) for p in points], x=x, y=y), y)


def picture(png: bytes, name: str) -> dg.MetadataValue:
    """A PNG as metadata that the UI shows in place."""
    return pictures({name: png})


def pictures(pngs: Mapping[str, bytes]) -> dg.MetadataValue:
    """PNGs by name, one below the other, as metadata that the UI shows in place."""
    return dg.MetadataValue.md(
        "\n\n".join(
            f"![{name}](data:image/png;base64,{base64.b64encode(png).decode()})"
            for name, png in pngs.items()
        )
    )
