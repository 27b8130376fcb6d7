"""The device mesh: axis names and construction. Every mesh has every axis; one that is not used has length 1.

pipe     stages of the pipeline
replica  whole copies of the training state
data     shards of the training state, and of the batch
expert   shards of the routed experts, and of the batch
"""

import jax

AXES = ("pipe", "replica", "data", "expert")
BATCH_AXES = ("replica", "data", "expert")  # rows of a batch are sharded over these


def make_mesh() -> jax.sharding.Mesh:
    """The mesh of one device."""
    return jax.make_mesh((1, 1, 1, 1), AXES, devices=jax.devices()[:1])
