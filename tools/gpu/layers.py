"""DeepSeek-V3's MoE layer and a stage of four of them, forward and backward, on one GPU's share of the experts.

With 64 GPUs that share the experts a GPU has 4 of 256, and its 4096 tokens and those of the others bring it 4096 x 8 =
32,768 rows. Here one GPU does that work with a layer of 8 experts, all of which each token uses: 4096 rows for each.
That is as many rows, in smaller groups, and twice the matrices, gradients and memory of experts. It leaves out the
all-to-alls, the limit to four nodes, the gate's other 248 columns, unbalanced experts, and what is outside of the
layers: embedding, head, MTP, the optimizer, and the pipeline's bubble.

A GPU of a pipeline of 16 has 61 / 16 layers: tokens/s x 4 / 61 is what it could do for the whole model at most.
DeepSeek's 1543 tokens/s per GPU are of the whole model, with all that is left out here.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gpu.bench import Bench
from moejax.config import ONE_DEVICE, ModelConfig, MoEConfig, MTPConfig
from moejax.model.block import run_stack, stack
from moejax.model.count import forward_flops_per_token

TOKENS, LAYERS = 4096, 4
LAYERS_OF_V3 = 61
DEEPSEEK = 1543.0  # tokens/s per GPU


def stage_bf16(bench: Bench) -> None:
    """One layer, and a stage."""
    _layers(bench, "bf16", 1)
    _layers(bench, "bf16", LAYERS)


def stage_fp8(bench: Bench) -> None:
    """The same with linear layers in FP8."""
    _layers(bench, "fp8", 1)
    _layers(bench, "fp8", LAYERS)


def stage_config(layers: int) -> ModelConfig:
    """V3 with so many MoE layers of 8 experts, and nothing else."""
    moe = MoEConfig(num_experts=8, num_groups=1, top_groups=1, top_k=8)
    return ModelConfig(num_layers=layers, num_dense_layers=0, moe=moe, mtp=MTPConfig(depth=0))


def stage_flops(layers: int, tokens: int) -> float:
    """FLOPs of the forward and the backward pass of one sequence, without what is computed again."""
    return 3.0 * forward_flops_per_token(stage_config(layers), tokens).moe_layer * layers * tokens


def _layers(bench: Bench, precision: str, layers: int) -> None:
    name = "V3 MoE layer" if layers == 1 else f"V3 stage of {layers} layers"
    cfg, shape = stage_config(layers), f"{TOKENS} tokens"
    with bench.attempt(f"{name}, {precision}", shape):
        blocks = bench.make(
            lambda: stack(nnx.Rngs(params=jax.random.key(0)), cfg, ONE_DEVICE, "moe", layers, fp8=precision == "fp8")
        )
        graph, params, others = nnx.split(blocks, nnx.Param, ...)
        x, dy = (bench.draw((1, TOKENS, cfg.hidden_size), seed=seed) for seed in (1, 2))

        def gradients(params: Any, others: Any, x: Any, dy: Any) -> Any:
            def forward(params: Any, x: Any) -> Any:
                positions = jnp.arange(TOKENS)[None]
                return run_stack(nnx.merge(graph, params, others), x, positions, None, cfg.remat, ONE_DEVICE)[0]

            return jax.vjp(forward, params, x)[1](dy)

        program = bench.compile(f"{name}, {precision}", gradients, params, others, x, dy, shape=shape)
        if bench.dry:
            return
        memory = program.memory_analysis()
        label = f"{name}, {precision}"
        seconds = bench.rate(label, TOKENS, "tokens/s", program, params, others, x, dy, shape=shape)
        assert seconds is not None
        rate = stage_flops(layers, TOKENS) / seconds
        bench.record(f"{label}: rate", rate, "FLOP/s", of="dense bf16 8192 x 8192 x 8192", precision=precision)
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        bench.record(f"{label}: memory", held, "bytes", note="weights, gradients, activations, by XLA's count")
        peak = (bench.device.memory_stats() or {}).get("peak_bytes_in_use")
        bench.record(f"{label}: most memory in use", peak, "bytes", note="of this section so far")
        if layers == LAYERS:
            whole = TOKENS / seconds * layers / LAYERS_OF_V3
            bench.record(f"{label}: scaled to {LAYERS_OF_V3} layers", whole, "tokens/s", aim=DEEPSEEK)
