"""How asset values travel: tables through the store, directories as verified paths.

What belongs here: Dagster's IO manager interface over ``ground.store``. No asset uses Dagster's
default IO manager: it pickles.
"""

from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa

from llmrec_assets.ground.lineage import trace
from llmrec_assets.ground.store import StoredTable
from llmrec_assets.ground.warehouse import publish_warehouse
from llmrec_assets.orchestration.provenance import (
    lineage_metadata,
    note_input,
    provenance_of_step,
)
from llmrec_assets.orchestration.resources import StoreResource


class TableIOManager(dg.ConfigurableIOManager):
    """Publishes a table as a version of its table; loads a frame, or ``StoredTable`` with its
    version, whichever the input is annotated with."""

    storage: dg.ResourceDependency[StoreResource]

    def handle_output(self, context: dg.OutputContext, obj: pa.Table) -> None:
        store = self.storage.store()
        name, partition = context.asset_key.path[-1], context.asset_partition_key
        version = store.publish_table(name, partition, obj, provenance_of_step())
        publish_warehouse(store)
        context.add_output_metadata(lineage_metadata(trace(store, name, partition, version)))
        context.log.info(f"published {name} version {version}")

    def load_input(self, context: dg.InputContext) -> Any:
        name, partition = context.asset_key.path[-1], context.asset_partition_key
        table = self.storage.store().read_table(name, partition)
        note_input(name, partition, table.version)
        return table if context.dagster_type.typing_type is StoredTable else table.frame


class DirectoryIOManager(dg.ConfigurableIOManager):
    """The value of a directory asset is its path: published by the asset, verified on loading."""

    storage: dg.ResourceDependency[StoreResource]

    def handle_output(self, context: dg.OutputContext, obj: Path) -> None:
        if not obj.is_dir():
            raise TypeError(f"{context.asset_key} returned {obj}, expected a published directory")

    def load_input(self, context: dg.InputContext) -> Path:
        name, partition = context.asset_key.path[-1], context.asset_partition_key
        path = self.storage.store().checkpoint(name, partition)
        note_input(name, partition, path.name)
        return path
