"""Where experts lie when a model is served: heavy ones several times, so that every GPU has about the same load.

The algorithm of DeepSeek's EPLB (github.com/deepseek-ai/EPLB), on plain arrays. A physical expert is a place for the
weights of a logical one; a logical expert with several places is replicated, and its tokens are spread over them.
Training has no use for it: there the router's biases balance the load.

L layers, E logical experts, R physical ones, m most replicas of an expert, T tokens, K experts per token.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Real

from moejax.config import ConfigError


@dataclass(frozen=True, eq=False)
class Placement:
    """The logical expert in every physical place; GPU g has the places from `g * R / gpus` on."""

    logical: np.ndarray  # int [L, R]: the expert in each place
    physical: np.ndarray  # int [L, E, m]: the places of each expert; -1 where it has fewer
    count: np.ndarray  # int [L, E]: how many those are


def rebalance_experts(
    load: Real[np.ndarray, "L E"], num_physical: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Placement:
    """A placement that balances a load which is expected to come again.

    Where the groups divide into the nodes, all experts of a group stay on a node (the router limits the groups of a
    token), and nodes are balanced first, then GPUs inside each; else the nodes are not looked at.

    Args:
        load: of each expert of each layer, in any unit; the layers are placed one by one.
        num_physical: places, in all; a multiple of the GPUs.
        num_groups: of experts, as the router has them.
        num_nodes: machines.
        num_gpus: in all; a multiple of the nodes.

    Raises:
        ConfigError: sizes that do not divide, or fewer places than experts.
    """
    experts = load.shape[1]
    _require(experts % num_groups == 0, "num_groups", num_groups, f"a divisor of the {experts} experts")
    _require(num_gpus > 0, "num_gpus", num_gpus, "a number above 0")
    _require(num_nodes > 0 and num_gpus % num_nodes == 0, "num_nodes", num_nodes, f"a divisor of num_gpus={num_gpus}")
    wanted = f"a multiple of num_gpus={num_gpus}, at least the {experts} experts"
    _require(num_physical % num_gpus == 0 and num_physical >= experts, "num_physical", num_physical, wanted)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    logical = np.stack([_place(row, num_physical, num_groups, num_nodes, num_gpus) for row in load])
    return placement_of(logical, experts)


def placement_of(logical: Int[np.ndarray, "L R"], num_experts: int) -> Placement:
    """The placement with these experts in its places.

    Raises:
        ConfigError: an expert has no place, or there is none of that number.
    """
    inside = logical.size > 0 and bool(logical.min() >= 0 and logical.max() < num_experts)
    _require(inside, "placement", int(logical.max(initial=-1)), f"experts below {num_experts}")
    count = np.stack([np.bincount(row, minlength=num_experts) for row in logical])
    _require(bool(count.min() > 0), "placement", f"expert {int(count.min(0).argmin())}", "a place in each layer")
    physical = np.full((*count.shape, count.max()), -1, np.int64)
    for layer, row in enumerate(logical):
        for expert in range(num_experts):
            places = np.flatnonzero(row == expert)
            physical[layer, expert, : len(places)] = places
    return Placement(logical.astype(np.int64), physical, count)


def plain_placement(num_layers: int, num_experts: int) -> Placement:
    """Every expert once, in order."""
    return placement_of(np.tile(np.arange(num_experts), (num_layers, 1)), num_experts)


def gpu_load(load: Real[np.ndarray, "L E"], placement: Placement, num_gpus: int) -> Float[np.ndarray, "L gpus"]:
    """The load of each GPU, when the tokens of an expert are spread evenly over its replicas."""
    each = np.take_along_axis(load / placement.count, placement.logical, axis=1)
    return each.reshape(len(load), num_gpus, -1).sum(-1)


def to_replicas(ids_TK: Any, physical_Em: Any, count_E: Any) -> Any:
    """The physical place of each choice of a layer; arrays of NumPy or of JAX.

    Token t takes replica t mod count of each of its experts: the same every time, and spread evenly. A choice of -1 is
    absent and stays so.

    Args:
        ids_TK: experts, as the router chose them.
        physical_Em: the row of the layer in `Placement.physical`.
        count_E: its row in `Placement.count`.
    """
    token_T1 = np.arange(ids_TK.shape[0])[:, None]
    place_TK = physical_Em[ids_TK, token_T1 % count_E[ids_TK]]
    return place_TK * (ids_TK >= 0) - (ids_TK < 0)


def laid_out(experts: Any, logical_R: Int[np.ndarray, "R"]) -> Any:
    """Weights of the experts of a layer, [E, ...], in their places, [R, ...]; arrays of NumPy or of JAX."""
    return experts[logical_R]


def _place(load: np.ndarray, num_physical: int, groups: int, nodes: int, gpus: int) -> np.ndarray:
    """The expert in each place of one layer."""
    size = len(load) // groups
    node_of_group = _pack(load.reshape(groups, size).sum(1), nodes)
    placed: list[np.ndarray] = []
    for node in range(nodes):  # each is balanced for itself
        own = (np.array(node_of_group[node])[:, None] * size + np.arange(size)).ravel()  # its experts
        replicas = _replicate(load[own], num_physical // nodes)
        copies = np.bincount(replicas)
        for pack in _pack((load[own] / copies)[replicas], gpus // nodes):
            placed.append(own[replicas[pack]])
    return np.concatenate(placed)


def _pack(weights: np.ndarray, packs: int) -> list[list[int]]:
    """The items of each pack, equally many: the heaviest first, each to the lightest pack that has room."""
    room = len(weights) // packs
    if room == 1:
        return [[item] for item in range(packs)]
    found: list[list[int]] = [[] for _ in range(packs)]
    sums = [0.0] * packs
    for item in np.argsort(-weights, kind="stable"):
        pack = min((p for p in range(packs) if len(found[p]) < room), key=lambda p: sums[p])
        found[pack].append(int(item))
        sums[pack] += float(weights[item])
    return found


def _replicate(load: np.ndarray, places: int) -> np.ndarray:
    """The expert in each of `places` places: all once, then again and again that whose replicas have most load."""
    copies = np.ones(len(load))
    found = list(range(len(load)))
    while len(found) < places:
        expert = int(np.argmax(load / copies))
        found.append(expert)
        copies[expert] += 1
    return np.array(found)


def _require(good: bool, place: str, value: object, wanted: str) -> None:
    if not good:
        raise ConfigError(place, value, wanted)
