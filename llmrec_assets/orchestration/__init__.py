"""Dagster floor, thin: an asset body takes inputs, calls one function below, returns metadata.

Loading this package imports no library of models, and none of pandas, DuckDB, RapidFuzz and
requests: a function whose module needs one is imported inside the body that calls it.
"""
