"""Block sizes of the grouped products: fixed for each kind, with nothing tuned at run time.

Every one of V3's products compiles for sm_90 with these without spilling registers; they have not been timed on a GPU.
"""

from typing import NamedTuple


class Blocks(NamedTuple):
    """What one program computes, [first, second] numbers of the result, `inner` of the contraction at a time."""

    first: int
    second: int
    inner: int
    num_warps: int
    num_stages: int


TILE = 128  # of FP8 numbers that share a scale: their products are promoted after that many
GROUP = 8  # blocks of the result's first dim whose programs run together, and find the other factor in the L2 cache


def blocks(columns: int) -> Blocks:
    """Of products in BF16 with that many columns; as wide as leaves none of a block empty, and no registers spilled."""
    return Blocks(128, 256, 64, 8, 4) if columns % 256 == 0 else Blocks(128, 128, 64, 8, 4)


SCALED_DOT = Blocks(128, 128, TILE, 8, 4)
SCALED_OUTER = Blocks(128, 128, TILE, 8, 4)
