"""Model floor: torch, transformers, peft and trl. Paths in, paths and numbers out; no Dagster."""
