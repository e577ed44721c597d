"""Dagster floor, thin: an asset body takes inputs, calls one function below, returns metadata.

Loading this package imports neither torch nor transformers: model functions are imported inside
the step that runs them.
"""
