"""Group ``source``: rating files, the tables read from them, and ratings that arrive later."""

from pathlib import Path

import dagster as dg

from llmrec_assets.ground import incoming_files
from llmrec_assets.orchestration.assets.common import (
    CODE_VERSION,
    RATINGS_FRESH,
    directory_options,
    table_options,
)
from llmrec_assets.orchestration.config import ForceConfig
from llmrec_assets.orchestration.partitions import dataset_of, dataset_partitions
from llmrec_assets.orchestration.resources import StoreResource
from llmrec_assets.orchestration.results import (
    CheckedResult,
    Frame,
    TableResult,
    checkpoint_result,
    table_result,
)

GROUP = "source"

NOTHING_QUARANTINED = "nothing_quarantined"
#: Metadata: what ``incoming_ratings`` was made of; the sensor compares it with what lies there.
FINGERPRINT = "accepted_fingerprint"


@dg.asset(
    **directory_options("movielens_files", GROUP, "python", "file"),
    partitions_def=dataset_partitions,
)
def movielens_files(
    context: dg.AssetExecutionContext, config: ForceConfig, storage: StoreResource
) -> CheckedResult:
    """The original files: the user's own, an earlier download, or the official archive."""
    from llmrec_assets.ground import movielens, sources

    store, dataset = storage.store(), dataset_of(context)
    found = sources.locate(
        dataset,
        data_dir=storage.user_data_directory(),
        sample_dir=storage.sample_directory(),
        cache_dir=Path(str(store.root)) / "downloads",
        log=context.log.info,
        download=storage.download,
    )
    movielens.require_readable(found.directory, dataset)
    determinants = {
        "files": {name: fact.sha256 for name, fact in found.files.items()},
        "code": CODE_VERSION,
    }

    def build(work: Path) -> tuple[Path, dict]:
        sources.copy_files(found, work / "files")
        return work / "files", {"origin": found.origin, "official": found.official}

    yield from checkpoint_result(context, store, config, determinants, build)


@dg.asset(**table_options("movies", GROUP), partitions_def=dataset_partitions)
def movies(context: dg.AssetExecutionContext, movielens_files: Path) -> TableResult:
    """Films: title, year, release date, genres, and the canonical id of titles under two ids."""
    from llmrec_assets.ground import movielens

    frame = movielens.read_movies(movielens_files, dataset_of(context))
    second_ids = int((frame["movie_id"] != frame["canonical_movie_id"]).sum())
    return table_result("movies", frame, {"titles_under_two_ids": second_ids})


@dg.asset(**table_options("users", GROUP), partitions_def=dataset_partitions)
def users(context: dg.AssetExecutionContext, movielens_files: Path) -> TableResult:
    """User profiles: age or age band, gender, occupation, ZIP code, city and state (paper §3.1)."""
    from llmrec_assets.ground import movielens

    frame = movielens.read_users(movielens_files, dataset_of(context))
    placed = float(frame["city"].notna().mean())
    return table_result("users", frame, {"share_with_a_place": placed})


@dg.asset(
    **table_options("incoming_ratings", GROUP),
    partitions_def=dataset_partitions,
    check_specs=[
        dg.AssetCheckSpec(
            NOTHING_QUARANTINED,
            asset="incoming_ratings",
            description="No rating file lies in incoming/<data set>/quarantine. Warns: the file is "
            "left out, the rest goes on.",
        )
    ],
)
def incoming_ratings(
    context: dg.AssetExecutionContext,
    storage: StoreResource,
    users: Frame,
    movies: Frame,
) -> CheckedResult:
    """Ratings that arrived as files in incoming/<data set>: merged, one per user and film."""
    from llmrec_assets.ground import incoming

    dataset = dataset_of(context)
    place = storage.incoming_directory(dataset)
    taken = incoming.take_in(place, dataset, users, movies, context.log.info)
    for name in taken.left:
        why = "no plain file, a strange name, or still being written"
        context.log.warning(f"left in {place}: {name} ({why})")
    quarantined = incoming_files.quarantined_files(place)
    yield dg.AssetCheckResult(
        check_name=NOTHING_QUARANTINED,
        passed=not quarantined,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={name: reason.split("\n")[0] for name, reason in quarantined.items()},
    )
    yield table_result(
        "incoming_ratings",
        taken.ratings,
        {
            "place": dg.MetadataValue.path(str(place)),
            "accepted_files": len(taken.accepted),
            FINGERPRINT: incoming_files.fingerprint(taken.accepted),
            "quarantined_files": len(quarantined),
            "left": taken.left or "nothing",
        },
    )


@dg.asset(
    **table_options("ratings", GROUP),
    partitions_def=dataset_partitions,
    freshness_policy=RATINGS_FRESH,
)
def ratings(
    context: dg.AssetExecutionContext,
    movielens_files: Path,
    users: Frame,
    movies: Frame,
    incoming_ratings: Frame,
) -> TableResult:
    """Ratings, 1 to 5 stars with their time; every user and movie id is known."""
    from llmrec_assets.ground import incoming, movielens

    original = movielens.read_ratings(movielens_files, dataset_of(context), users, movies)
    frame = incoming.merged([original, incoming_ratings])
    return table_result(
        "ratings",
        frame,
        {
            "users": int(frame["user_id"].nunique()),
            "movies": int(frame["movie_id"].nunique()),
            "share_liked": float((frame["rating"] >= 3).mean()),
            "added_by_incoming_files": len(frame) - len(original),
        },
    )
