"""Devices of a cluster of NVIDIA H200s that need not exist: programs are compiled for them, and read.

XLA compiles for a GPU without having one when it is told what the GPU is like. What comes out is what a GPU would run,
but for choices that are made by timing (the shapes of tiles): its schedule, its collectives and the memory it needs.
"""

from importlib.resources import files

import jax
import numpy as np
from jax.experimental import topologies

PER_NODE = 8  # devices that NVLink connects


def h200_devices(count: int) -> np.ndarray:
    """`count` devices, on nodes of 8; programs can be compiled for a mesh of them, not run.

    Raises:
        ValueError: `count` is neither below 8 nor a multiple of it.
        RuntimeError: XLA's plugin for CUDA is not installed, or has not been loaded.
    """
    if count > PER_NODE and count % PER_NODE:
        raise ValueError(f"count={count} is not a multiple of the {PER_NODE} devices of a node")
    topology = f"1x{max(count // PER_NODE, 1)}x{min(count, PER_NODE)}"  # partitions, nodes in each, devices in each
    target = files("moejax.plan").joinpath("h200.txtpb").read_text()
    try:
        found = topologies.get_topology_desc(platform="cuda", target_config=target, topology=topology)
    except NotImplementedError:
        advice = "pip install 'moejax[hopper]', and set JAX_PLATFORMS=cpu where there is no GPU"
        raise RuntimeError(f"to compile for H200s jax {jax.__version__} needs its plugin for CUDA: {advice}") from None
    return np.asarray(found.devices)
