"""Column lineage names columns that are there."""

from llmrec_assets.ground.column_lineage import expanded, sources
from llmrec_assets.ground.schemas import SCHEMAS
from llmrec_assets.ground.stages import RECOMMENDATION_TABLES


def test_every_column_named_is_a_declared_one() -> None:
    for asset, schema in SCHEMAS.items():
        for column, made_from in sources(asset).items():
            assert column in schema.names, asset
            assert made_from, (asset, column)
            for table, name in expanded(made_from):
                assert name in SCHEMAS[table].names, (asset, column, table, name)
                assert table != asset


def test_tables_read_from_files_or_models_alone_have_none() -> None:
    without = {asset for asset in SCHEMAS if not sources(asset)}
    assert without == {"incoming_ratings", "movies", "users", "memorisation", "promotions"}


def test_a_metric_goes_back_to_the_lists_of_every_recommender() -> None:
    assert dict.fromkeys(expanded(sources("metric_table")["ndcg"])) == {
        ("user_metrics", "ndcg"): None
    }
    back = set(expanded(sources("user_metrics")["ndcg"]))
    assert {(table, "movie_id") for table in RECOMMENDATION_TABLES} <= back
    assert ("prompts", "ground_truth_movie_ids") in back
