"""One training step of moejax beside the same model in `transformers`, both in FP32 on this machine's cores.

    python tools/bench_step.py --torch PYTHON      # PYTHON: an interpreter that has torch and transformers

The two take turns, so that what else the machine does meets both. `transformers` runs in a process of its own with its
fastest experts on CPU (`grouped_mm`) and torch's AdamW. A step is the forward and the backward pass and the optimizer.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCAB, LENGTH, ROWS = 4096, 256, 8
TOKENS = LENGTH * ROWS
STEPS_OF_A_TURN = 2
Turn = list[tuple[float, float]]  # wall and CPU seconds of each step


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each")
    parser.add_argument("--torch", metavar="PYTHON", help="interpreter that has torch and transformers")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--be-the-peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.be_the_peer:
        answer_turns(torch_step())
        return
    result = compare(args.steps, args.torch)
    print(json.dumps(result) if args.json else table(result))


def compare(steps: int, torch: str | None) -> dict[str, Any]:
    """Medians over the steps of both, and what share of the machine's peak they reach."""
    from moejax.launch.host_memory import keep_freed_memory
    from moejax.model.count import train_flops_per_token

    keep_freed_memory()  # as `moejax train` does on CPU
    config = bench_config()
    peer = Peer(torch) if torch else None
    own_step = moejax_step(config)
    takers: dict[str, Callable[[], Turn]] = {"moejax": lambda: take_turn(own_step)}
    if peer:
        takers["transformers"] = peer.take_turn
    samples: dict[str, Turn] = {name: [] for name in takers}
    peaks = []
    for turn in range(-1, -(-steps // STEPS_OF_A_TURN)):  # the first turn warms up
        peaks.append(matmul_peak())
        for name, take in takers.items():
            taken = take()
            samples[name] += taken if turn >= 0 else []
    flops, peak = train_flops_per_token(config.model, LENGTH) * TOKENS, max(peaks)
    rows = {}
    for name, pairs in samples.items():
        walls, cpus = zip(*pairs, strict=True)
        wall = statistics.median(walls)
        rows[name] = {
            "seconds": wall,
            "fastest": min(walls),
            "cpu_seconds": statistics.median(cpus),
            "tokens_per_second": TOKENS / wall,
            "share_of_peak": flops / wall / peak,
        }
    ratio = rows["moejax"]["tokens_per_second"] / rows["transformers"]["tokens_per_second"] if peer else None
    return {"machine": machine(), "peak_flops": peak, "step_flops": flops, "steps": steps, "rows": rows, "ratio": ratio}


def table(result: dict[str, Any]) -> str:
    """The result as a person reads it."""
    head = f"{'':14}{'s/step':>9}{'fastest':>9}{'CPU-s':>8}{'tokens/s':>10}{'of peak':>9}"
    lines = [f"{result['machine']}; FP32 matmul peak {result['peak_flops'] / 1e9:.0f} GFLOP/s", head]
    for name, r in result["rows"].items():
        times = f"{r['seconds']:9.3f}{r['fastest']:9.3f}{r['cpu_seconds']:8.2f}"
        lines.append(f"{name:14}{times}{r['tokens_per_second']:10.0f}{r['share_of_peak']:9.1%}")
    if result["ratio"]:
        lines.append(f"moejax is {result['ratio']:.2f} times as fast (medians of {result['steps']} steps, in turns)")
    return "\n".join(lines)


def machine() -> str:
    """Processor and number of usable cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor()}, {cores} cores"


# --------------------------------------------------------------------------------------------------------------- turns


def take_turn(step: Callable[[], None]) -> Turn:
    """Wall and CPU seconds of a few steps."""
    taken = []
    for _ in range(STEPS_OF_A_TURN):
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        taken.append((time.perf_counter() - wall, time.process_time() - cpu))
    return taken


class Peer:
    """`transformers` in another process, which waits for its turns at a pipe."""

    def __init__(self, python: str):
        command = [python, __file__, "--be-the-peer"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def take_turn(self) -> Turn:
        """The same as `take_turn`, over there."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print("turn", file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the peer ended with code {self.process.wait()}")
        time.sleep(0.3)  # its threads wait actively for a moment
        return json.loads(line)


def answer_turns(step: Callable[[], None]) -> None:
    """A line of JSON for each line of the input."""
    for _ in sys.stdin:
        print(json.dumps(take_turn(step)), flush=True)


# ------------------------------------------------------------------------------------------------------- the two models


def bench_config() -> Any:
    """The run that is measured."""
    from moejax.config import (
        AttentionConfig,
        BalanceConfig,
        DataConfig,
        ModelConfig,
        MoEConfig,
        MTPConfig,
        OptimizerConfig,
        RunConfig,
    )

    attention = AttentionConfig(
        num_heads=8, q_lora_rank=96, kv_lora_rank=64, qk_nope_dim=32, qk_rope_dim=16, v_dim=32, block=64
    )
    moe = MoEConfig(
        num_experts=16,
        top_k=4,
        num_groups=4,
        top_groups=2,
        expert_width=176,
        balance=BalanceConfig(sequence=0.0),  # the peer has none
    )
    model = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        num_layers=4,
        num_dense_layers=1,
        dense_width=704,
        attention=attention,
        moe=moe,
        mtp=MTPConfig(depth=0),
        init_std=0.02,
        remat="none",
        unroll=3,  # all MoE layers
    )
    data = DataConfig(sequence_length=LENGTH, batch_size=ROWS)
    return RunConfig(steps=1, precision="fp32", model=model, data=data, optimizer=OptimizerConfig(moments="fp32"))


def moejax_step(config: Any) -> Callable[[], None]:
    """One step of ours, compiled, on random tokens."""
    import jax
    import numpy as np

    from moejax.data.batches import Batch
    from moejax.mesh import one_device_mesh
    from moejax.train.state import new_state
    from moejax.train.step import StepSettings, make_train_step, place

    mesh = one_device_mesh()
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    batch = place(Batch(tokens, np.zeros_like(tokens), np.ones(tokens.shape, bool)), mesh)
    settings = StepSettings(*(np.float32(x) for x in (1e-3, 1e-3, 0.0)))
    compiled, state = make_train_step(config, mesh), new_state(config, mesh)

    def step() -> None:
        nonlocal state
        state, metrics = compiled(state, batch, settings)
        jax.block_until_ready((state, metrics))

    return step


def torch_step() -> Callable[[], None]:
    """One step of `transformers`, on random tokens."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=704,
        moe_intermediate_size=176,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        n_shared_experts=1,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        kv_lora_rank=64,
        q_lora_rank=96,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=LENGTH,
    )
    config._experts_implementation = "grouped_mm"
    model = DeepseekV3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH))

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def matmul_peak() -> float:
    """FLOP/s of the fastest product of two FP32 matrices among several sizes."""
    import jax
    import jax.numpy as jnp

    product, best = jax.jit(jnp.dot), 0.0
    for rows, inner, columns in ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 512, 4096)):
        a, b = jnp.ones((rows, inner)), jnp.ones((inner, columns))
        jax.block_until_ready(product(a, b))
        start = time.perf_counter()
        jax.block_until_ready(product(a, b))
        best = max(best, 2 * rows * inner * columns / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    main()
