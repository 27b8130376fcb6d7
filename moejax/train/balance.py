"""How evenly the tokens of a layer are spread over its experts. L MoE layers, E experts; NumPy only."""

from typing import Any

import numpy as np
from scipy.special import entr


def relative_load(counts_LE: Any) -> np.ndarray:
    """Tokens of each expert relative to its layer's mean, [L, E]; `counts_LE`: an array of any kind."""
    counts_LE = np.asarray(counts_LE)
    return counts_LE / counts_LE.mean(-1, keepdims=True)


def load_entropy(load_LE: np.ndarray) -> np.ndarray:
    """Entropy in nats of the shares that the experts of a layer have of its tokens, [L]; ln E is the most."""
    return entr(load_LE / max(load_LE.shape[-1], 1)).sum(-1)
