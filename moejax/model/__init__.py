"""Flax NNX modules: they hold the parameters and name their shapes; `moejax.ops` does the arithmetic."""
