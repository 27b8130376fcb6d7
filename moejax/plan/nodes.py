"""Which devices of a mesh are on which node, and what of a collective so comes from other nodes."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from moejax.config import MeshConfig
from moejax.mesh import AXES


class Nodes:
    """Which devices are on which node, and what of a collective comes from other nodes."""

    def __init__(self, cfg: MeshConfig, per_node: int):
        """`per_node`: devices of a node; the nodes hold them in the order of the mesh."""
        lengths = tuple(getattr(cfg, axis) for axis in AXES)
        self.lengths = dict(zip(AXES, lengths, strict=True))
        self.node = (np.arange(math.prod(lengths)) // per_node).reshape(lengths)

    def label(self, axes: Iterable[str]) -> str:
        """Those of the axes that are longer than 1: "data x expert"."""
        return " x ".join(axis for axis in AXES if axis in axes and self.lengths[axis] > 1)

    def _rows(self, axes: Sequence[str]) -> np.ndarray:
        """The nodes of the devices along `axes`, [everything else, along]."""
        order = [i for i, axis in enumerate(AXES) if axis not in axes] + [AXES.index(axis) for axis in axes]
        return self.node.transpose(order).reshape(-1, math.prod(self.lengths[axis] for axis in axes))

    def share(self, axes: Iterable[str], groups: Sequence[Sequence[int]] | None = None) -> float:
        """Of what each device gets from equal parts of its group; `groups` of indices along the one axis."""
        rows = self._rows([axis for axis in AXES if axis in axes])
        members = rows[:, None, :] if groups is None else rows[:, np.asarray(groups)]
        return float((members[..., :, None] != members[..., None, :]).mean())

    def share_of_pairs(self, pairs: Sequence[tuple[int, int]]) -> float:
        """Of what is sent from stage to stage."""
        rows = self._rows(["pipe"])
        return float(np.mean([rows[:, a] != rows[:, b] for a, b in pairs]))
