"""The route of the expert exchange and its sizes, all known before the program runs. Python integers only.

A token travels in hops. In each it goes at most once to each destination where one of its experts is: one hop over all
devices of the axis, or, with nodes, one to the device of equal index in each of its nodes, and one from there to the
devices inside the node (arXiv:2412.19437, section 3.2.2).

E experts in G groups, of which a token uses M; K experts per token.
"""

import math
from dataclasses import dataclass

from moejax.config import MoEConfig

_ALIGNMENT = 8  # slots and rows come in multiples of it


@dataclass(frozen=True)
class Hop:
    """One all-to-all among groups of devices of a mesh axis."""

    axis: str
    destinations: int  # devices in a group
    slots: int  # rows that travel per pair of devices and round
    groups: tuple[tuple[int, ...], ...] | None = None  # indices on the axis, in order; None: one group of all
    fp8: bool = False  # whether what goes to experts travels in FP8: tokens, and the gradients of results

    @property
    def rows(self) -> int:
        """Rows that a device sends, and receives, in a round."""
        return self.destinations * self.slots


@dataclass(frozen=True)
class Exchange:
    """How tokens travel to their experts, and how many rows are worked on at a time where they arrive."""

    hops: tuple[Hop, ...] = ()
    max_rows: int | None = None  # None: all
    fp8: bool = False  # whether the experts compute in FP8


def plan_exchange(
    cfg: MoEConfig,
    num_tokens: int,
    axis_size: int,
    nodes: int = 1,
    slack: float = 1.25,
    fp8: bool = False,
    axis: str = "expert",
) -> Exchange:
    """The exchange of `num_tokens` tokens per device over `axis`, whose devices hold equal shares of the experts.

    Device i of the axis is number `i % (axis_size // nodes)` of node `i // (axis_size // nodes)`. With P(n) the
    probability that a token visits a given one of n equal destinations (`visit_probability`), balanced routing sends
    `num_tokens * P(nodes)` tokens to a node, of which `nodes * num_tokens * P(axis_size)` in all go on from one device
    to another inside it; a pair of devices has `slack` times as many slots, and never more than there are tokens. A
    device works on `slack` times its share of the choices, `num_tokens * top_k`, at a time, and never on more than it
    can receive.
    """
    if axis_size == 1:
        return Exchange(fp8=fp8)
    inside = axis_size // nodes
    per_device = num_tokens * visit_probability(cfg, axis_size)
    if 1 < nodes < axis_size:
        per_node = _sized(slack * num_tokens * visit_probability(cfg, nodes), num_tokens)
        across = tuple(tuple(range(i, axis_size, inside)) for i in range(inside))
        within = tuple(tuple(range(i, i + inside)) for i in range(0, axis_size, inside))
        forwarded = _sized(slack * nodes * per_device, nodes * per_node)
        hops: tuple[Hop, ...] = (
            Hop(axis, nodes, per_node, across, fp8),
            Hop(axis, inside, forwarded, within, fp8),
        )
    else:
        hops = (Hop(axis, axis_size, _sized(slack * per_device, num_tokens), fp8=fp8),)
    received = hops[-1].rows * min(cfg.top_k, cfg.num_experts // axis_size)
    return Exchange(hops, _sized(slack * num_tokens * cfg.top_k, received), fp8)


def visit_probability(cfg: MoEConfig, destinations: int) -> float:
    """The probability that a token has an expert at a given one of `destinations` equal parts of the experts.

    Of a token whose M groups are drawn without preference, and then its K experts among the M * E / G in them. A
    destination has s = E / (n g) experts of each of g = max(1, G / n) groups, so it holds j s experts of the token's
    groups with the hypergeometric probability C(g, j) C(G - g, M - j) / C(G, M), and none of the token's K then with
    C(M E / G - j s, K) / C(M E / G, K). Where neither groups divide into destinations nor destinations into groups, the
    groups are left out of account, which is on the side of more slots.
    """
    groups, top_groups = cfg.num_groups, cfg.top_groups
    if groups % destinations and destinations % groups:
        groups = top_groups = 1
    parts = max(1, groups // destinations)
    share = cfg.num_experts // (destinations * parts)
    reach = top_groups * cfg.num_experts // groups
    total = 0.0
    for j in range(1, min(parts, top_groups) + 1):
        holds = math.comb(parts, j) * math.comb(groups - parts, top_groups - j) / math.comb(groups, top_groups)
        total += holds * (1 - math.comb(reach - j * share, cfg.top_k) / math.comb(reach, cfg.top_k))
    return total


def _sized(wanted: float, most: int) -> int:
    """`wanted` rounded up to the alignment, from 1 up to `most`."""
    return min(most, _ALIGNMENT * max(1, math.ceil(wanted / _ALIGNMENT)))
