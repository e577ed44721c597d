"""The assets, by group. Nobody computes here: inputs, one call to a floor below, metadata."""
