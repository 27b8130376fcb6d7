"""What kernels are tried on: groups of any size, and the products of V3."""

import numpy as np
import pytest

GROUPS = {  # their sizes, and rows in all
    "uneven": ((130, 7, 64), 201),
    "empty ones": ((0, 129, 0, 3, 0), 132),
    "unaligned, with rows beyond": ((31, 100, 2), 300),
    "all rows to one": ((0, 140, 0), 140),
    "no rows in groups": ((0, 0), 5),
    "one row": ((1,), 1),
}
PRODUCTS = {  # experts, inputs, outputs
    "gate and up of experts": (8, 7168, 4096),
    "down of experts": (8, 2048, 7168),
    "queries down": (1, 7168, 1536),
    "queries up": (1, 1536, 24576),
    "keys and values down": (1, 7168, 576),
    "keys and values up": (1, 512, 32768),
    "attention's output": (1, 16384, 7168),
    "a tiny one": (4, 48, 32),
}
ROWS = 4096  # of a product of V3, here

over_groups = pytest.mark.parametrize(("sizes", "num_rows"), GROUPS.values(), ids=GROUPS.keys())
over_products = pytest.mark.parametrize("dims", PRODUCTS.values(), ids=PRODUCTS.keys())


def bounds(sizes):
    """Start and end of each group."""
    ends = np.cumsum(sizes)
    return list(zip(ends - sizes, ends, strict=True))
