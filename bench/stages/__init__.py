"""One module a stage: its input, our side, the peers, the check."""
