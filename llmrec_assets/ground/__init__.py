"""Ground floor: plain functions over plain data. Imports neither Dagster nor torch."""
