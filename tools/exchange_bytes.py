"""What the expert exchange sends between nodes, in one hop and in two, counted in the compiled program.

    python tools/exchange_bytes.py            DeepSeek-V3's layer on 64 devices, of which 8 are a node

With node-limited routing a token crosses to each of its nodes once in two hops, where one hop sends it to each of its
devices. The forward pass of the exchange is compiled for simulated devices and the bytes of its all-to-alls that go
from node to node are added up; expected is what the probabilities of balanced routing say (`hops.visit_probability`).
Rows of the model's full width; the experts are narrow, as nothing of them travels.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import MeshConfig, MoEConfig
from moejax.mesh import make_mesh, simulate
from moejax.ops.hops import Exchange, plan_exchange, visit_probability
from moejax.ops.rounds import exchanged_swiglu
from moejax.plan.collectives import collectives


def bytes_between_nodes(exchange: Exchange, cfg: MoEConfig, tokens: int, dim: int, devices: int, nodes: int) -> int:
    """Bytes that the first round of a layer's forward pass carries from node to node, all devices together."""
    mesh = make_mesh(MeshConfig(data=1, expert=devices), jax.devices()[:devices])

    def layer(x: jax.Array, weights: jax.Array, ids: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        return exchanged_swiglu(x, weights, ids, gate_up, down, exchange)[0]

    def shape(*dims: int, dtype: type = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, P("expert")))

    # in the program as it is traced rows are bfloat16; XLA for CPU may move them in float32
    rows, choices = shape(devices * tokens, dim, dtype=jnp.bfloat16), (devices * tokens, cfg.top_k)
    experts = shape(cfg.num_experts, dim, 2 * cfg.expert_width), shape(cfg.num_experts, cfg.expert_width, dim)
    step = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))
    program = step.lower(rows, shape(*choices), shape(*choices, dtype=jnp.int32), *experts)
    text = program.compile(compiler_options={"xla_backend_optimization_level": 0}).as_text()
    node = np.arange(devices) // (devices // nodes)
    return sum(c.bytes_between(node) for c in collectives(text) if c.kind == "all-to-all" and not c.looped)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096, help="per device")
    parser.add_argument("--dim", type=int, default=7168)
    options = parser.parse_args()
    simulate(options.devices)
    devices, nodes = options.devices, options.nodes
    print("| experts | groups | slack | one hop, MB | two hops, MB | counted ratio | expected ratio |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for top_groups in (1, 2, 4, 8):
        cfg = MoEConfig(num_experts=256, num_groups=8, top_groups=top_groups, top_k=8, expert_width=8)
        far_devices = visit_probability(cfg, devices) * (devices - devices // nodes)
        far_nodes = visit_probability(cfg, nodes) * (nodes - 1)
        sizes = []
        for hops in (1, nodes):
            exchange = plan_exchange(cfg, options.tokens, devices, hops)
            exchange = dataclasses.replace(exchange, max_rows=None)
            sizes.append(bytes_between_nodes(exchange, cfg, options.tokens, options.dim, devices, nodes))
        counted = f"{sizes[0] / 1e6:.0f} | {sizes[1] / 1e6:.0f} | {sizes[0] / sizes[1]:.3f}"
        groups = f"{top_groups} of {cfg.num_groups}"
        print(f"| 8 of 256 | {groups} | 1.25 | {counted} | {far_devices / far_nodes:.3f} |", flush=True)


if __name__ == "__main__":
    main()
