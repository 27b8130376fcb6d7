"""What is measured with torch, in a process and maybe an interpreter of its own: it needs neither JAX nor moejax.

    python with_torch.py ceilings|transformers SIZES [--tiny]

SIZES is JSON. Prints a `Result` without its section as a line of JSON for each number. `--tiny`: on the CPU, to see
that it runs; its numbers mean nothing.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

E4M3_LARGEST = 448.0
CALLS, SPANS = 20, 5


def main() -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ceilings", "transformers"))
    parser.add_argument("sizes", type=json.loads)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    needed = ("torch", "transformers") if options.what == "transformers" else ("torch",)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        say(options.what, note=f"not measured: {missing[0]} is not installed here")
    elif options.what == "ceilings":
        ceilings(**options.sizes, tiny=options.tiny)
    else:
        train(**options.sizes, tiny=options.tiny)


def say(name: str, value: float | None = None, unit: str = "", **about: Any) -> None:
    """Prints a result."""
    print(json.dumps({"name": name, "value": value, "unit": unit, **about}), flush=True)


def attempt(action: Callable[[], float], name: str, unit: str, **about: Any) -> float | None:
    """Says what `action` returns, and returns it; that something of torch does not run here is no failure, but said."""
    try:
        value = action()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        say(name, note=f"does not run: {type(error).__name__}: {lines[0][:160]}", **about)
        return None
    say(name, value, unit, **about)
    return value


def wait() -> None:
    """Until the GPU, if there is one, has done all."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any]) -> float:
    """Of one call, when calls follow each other: the median of several spans of them."""
    spans = []
    for span in range(SPANS + 1):  # the first warms up
        wait()
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        wait()
        spans += [(time.perf_counter() - start) / CALLS] if span else []
    return statistics.median(spans)


def ceilings(sizes: list[tuple[int, int, int]], copied: int, tiny: bool) -> None:
    """Bytes/s of a copy, read and written; FLOP/s of dense products in BF16 and FP8. `copied`: bytes."""
    import torch

    device = "cpu" if tiny else "cuda"
    sizes = [(64, 64, 64)] if tiny else sizes
    source = torch.empty(1 << 20 if tiny else copied, dtype=torch.uint8, device=device).random_()
    to = torch.empty_like(source)
    attempt(lambda: 2 * source.numel() / seconds(lambda: to.copy_(source)), "copy", "bytes/s", by="torch")
    for dims in sizes:
        dense(*dims, device)


def dense(rows: int, inner: int, columns: int, device: str) -> None:
    """A product in BF16, and one in FP8 with a scale for each factor, its sums exact or of 14 bits."""
    import torch

    a, b = (torch.randn(n, inner, device=device).bfloat16() for n in (rows, columns))
    a8, b8 = ((x * (E4M3_LARGEST / x.abs().max())).to(torch.float8_e4m3fn) for x in (a, b))
    one = torch.ones((), device=device)

    def scaled(fast: bool) -> Any:
        return torch._scaled_mm(a8, b8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=fast)

    flops, about = 2.0 * rows * inner * columns, {"shape": f"{rows} x {inner} x {columns}"}
    attempt(lambda: flops / seconds(lambda: a @ b.T), "dense bf16", "FLOP/s", by="torch", **about)
    attempt(lambda: flops / seconds(lambda: scaled(False)), "dense fp8", "FLOP/s", by="torch", **about)
    attempt(lambda: flops / seconds(lambda: scaled(True)), "dense fp8", "FLOP/s", by="torch, sums of 14 bits", **about)


def train(model: dict[str, Any], tokens: str, flops: float, tiny: bool) -> None:
    """Tokens/s of training `DeepseekV3ForCausalLM`: weights, gradients and moments in BF16, SDPA, fused AdamW.

    That is less than ours does: FP32 master weights, an FP32 gradient, clipping. Eager, and by `torch.compile`.

    Args:
        model: fields of `ModelConfig`.
        tokens: an .npy file, [steps, rows, length].
        flops: of a token.
        tiny: on the CPU, and only eager.
    """
    import numpy as np
    import torch

    batches = torch.from_numpy(np.load(tokens)).long().to("cpu" if tiny else "cuda")
    steps, rows, length = batches.shape
    for how in ("eager",) if tiny else ("eager", "compiled"):

        def rate(how: str = how) -> float:
            network = peer(model, length, "cpu" if tiny else "cuda")
            optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
            call = torch.compile(network) if how == "compiled" else network
            taken = []
            for batch in batches:
                wait()
                start = time.perf_counter()
                call(input_ids=batch, labels=batch, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                wait()
                taken.append(time.perf_counter() - start)
            return rows * length / statistics.median(taken[steps // 2 :])

        reached = attempt(rate, "transformers", "tokens/s", shape=f"{rows} x {length}", by=how)
        if reached is not None:
            say("transformers: rate", reached * flops, "FLOP/s", by=how, of="dense bf16 8192 x 8192 x 8192")


def peer(model: dict[str, Any], length: int, device: str) -> Any:
    """The model, in BF16, with its fastest experts."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    attention, experts = model["attention"], model["moe"]
    config = DeepseekV3Config(
        vocab_size=model["vocab_size"],
        hidden_size=model["hidden_size"],
        intermediate_size=model["dense_width"],
        moe_intermediate_size=experts["expert_width"],
        num_hidden_layers=model["num_layers"],
        first_k_dense_replace=model["num_dense_layers"],
        num_attention_heads=attention["num_heads"],
        num_key_value_heads=attention["num_heads"],
        n_shared_experts=experts["num_shared"],
        n_routed_experts=experts["num_experts"],
        num_experts_per_tok=experts["top_k"],
        n_group=experts["num_groups"],
        topk_group=experts["top_groups"],
        routed_scaling_factor=experts["route_scale"],
        kv_lora_rank=attention["kv_lora_rank"],
        q_lora_rank=attention["q_lora_rank"],
        qk_rope_head_dim=attention["qk_rope_dim"],
        qk_nope_head_dim=attention["qk_nope_dim"],
        v_head_dim=attention["v_dim"],
        max_position_embeddings=length,
        initializer_range=model["init_std"],
    )
    config._experts_implementation = "grouped_mm"
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(device):
        return DeepseekV3ForCausalLM(config).bfloat16().train()


if __name__ == "__main__":
    main()
