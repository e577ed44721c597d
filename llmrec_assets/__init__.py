"""An LLM recommender as a Dagster asset graph: ratings → prompts → SFT → recommendations → metrics.

Floors (imports only go down; import-linter holds it):

1. ``ground``: plain functions and data; neither Dagster nor torch.
2. ``models``: torch, transformers, peft and trl; no Dagster.
3. ``orchestration``: Dagster, thin: assets, checks, resources, jobs.
4. ``definitions`` and ``cli``: the code location and the command line.
"""
