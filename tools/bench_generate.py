"""Generation by moejax beside the `generate` of `transformers`: the same weights, prompts, machine and FP32.

    python tools/bench_generate.py --torch PYTHON      # PYTHON: an interpreter that has torch and transformers

The two take turns, so that what else the machine does meets both. `transformers` runs in a process of its own with its
cache, and with its fastest experts on CPU (`grouped_mm`). Both take the likeliest token, and so many of them. A turn is
measured as a whole, the prompts included; the time of a token is the difference of a long and a short answer.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_step import bench_config, machine

SHORT, LONG = 16, 80  # tokens of an answer
CASES = ((1, 16), (8, 128))  # rows of a batch, tokens of each prompt
Taken = dict[str, Any]  # wall and CPU seconds of a short and a long answer, and the long answer's ids


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="measured turns of each")
    parser.add_argument("--torch", metavar="PYTHON", help="interpreter that has torch and transformers")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--be-the-peer", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.be_the_peer:
        generate = torch_generate(args.be_the_peer)
        for line in sys.stdin:
            print(json.dumps(turn(generate, *json.loads(line))), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = compare(args.turns, args.torch, Path(folder))
    print(json.dumps(result) if args.json else table(result))


def compare(turns: int, torch: str | None, folder: Path) -> dict[str, Any]:
    """Medians over the turns of both, case by case."""
    write_model(folder)
    own = moejax_generate(folder)
    takers: dict[str, Callable[..., Taken]] = {"moejax": lambda rows, length: turn(own, rows, length)}
    if torch:
        takers["transformers"] = Peer(torch, folder)
    cases = []
    for rows, length in CASES:
        samples: dict[str, list[Taken]] = {name: [] for name in takers}
        for number in range(-1, turns):  # the first turn warms up
            for name, take in takers.items():
                taken = take(rows, length)
                samples[name] += [taken] if number >= 0 else []
        equal = [same_start(*(taken[0]["ids"] for taken in samples.values()))] if torch else []
        cases.append({"rows": rows, "prompt": length, "equal_tokens": equal, **medians(samples, rows)})
    return {"machine": machine(), "turns": turns, "cases": cases}


def medians(samples: dict[str, list[Taken]], rows: int) -> dict[str, Any]:
    """Of each: seconds of a long answer, milliseconds of a step, tokens of all rows in a second; and the ratios."""
    found: dict[str, Any] = {}
    for name, taken in samples.items():
        step = statistics.median((t["long"] - t["short"]) / (LONG - SHORT) for t in taken)
        cpu = statistics.median((t["long_cpu"] - t["short_cpu"]) / (LONG - SHORT) for t in taken)
        seconds = statistics.median(t["long"] for t in taken)
        found[name] = {"seconds": seconds, "step_ms": 1e3 * step, "cpu_ms": 1e3 * cpu, "per_second": rows / step}
    if len(found) == 2:
        own, peer = found.values()
        found["ratio"] = {"step": peer["step_ms"] / own["step_ms"], "whole": peer["seconds"] / own["seconds"]}
    return found


def same_start(own: list[list[int]], other: list[list[int]]) -> float:
    """Share of the tokens that are equal before the first in which a row differs."""
    same = 0
    for a, b in zip(own, other, strict=True):
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return same / sum(map(len, own))


def table(result: dict[str, Any]) -> str:
    """The result as a person reads it."""
    lines = [f"{result['machine']}; {LONG} tokens, medians of {result['turns']} turns"]
    lines.append(f"{'rows x prompt':16}{'':14}{'s in all':>9}{'ms/step':>9}{'CPU-ms':>8}{'tokens/s':>10}")
    for case in result["cases"]:
        name = f"{case['rows']} x {case['prompt']}"
        for who in ("moejax", "transformers"):
            if who in case:
                r = case[who]
                numbers = f"{r['seconds']:9.2f}{r['step_ms']:9.2f}{r['cpu_ms']:8.2f}{r['per_second']:10.0f}"
                lines.append(f"{name:16}{who:14}{numbers}")
        if "ratio" in case:
            ratio, equal = case["ratio"], case["equal_tokens"][0]
            lines.append(
                f"{'':16}{ratio['step']:.2f} times as fast a step, {ratio['whole']:.2f} in all; {equal:.0%} equal"
            )
    return "\n".join(lines)


def turn(generate: Callable[[list[list[int]], int], list[list[int]]], rows: int, length: int) -> Taken:
    """A short and a long answer to the same random prompts."""
    import random

    draw = random.Random(length)
    prompts = [[draw.randrange(8, 4096) for _ in range(length)] for _ in range(rows)]
    taken: Taken = {}
    for name, tokens in (("short", SHORT), ("long", LONG)):
        wall, cpu = time.perf_counter(), time.process_time()
        taken["ids"] = generate(prompts, tokens)
        taken[name], taken[f"{name}_cpu"] = time.perf_counter() - wall, time.process_time() - cpu
    return taken


class Peer:
    """`transformers` in another process, which waits for its turns at a pipe."""

    def __init__(self, python: str, folder: Path):
        command = [python, __file__, "--be-the-peer", str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, rows: int, length: int) -> Taken:
        """The same as `turn`, over there."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([rows, length]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the peer ended with code {self.process.wait()}")
        time.sleep(0.3)  # its threads wait actively for a moment
        return json.loads(line)


# ------------------------------------------------------------------------------------------------------- the two models


def write_model(folder: Path) -> None:
    """The model of `bench_step.py`, drawn, in the layout of Hugging Face."""
    from flax import nnx
    from safetensors.numpy import save_file

    from moejax.mesh import one_device_mesh
    from moejax.model.hf import to_hf_tensors
    from moejax.model.hf_config import config_to_hf
    from moejax.train.state import model_structure, new_state

    config = bench_config()
    state = new_state(config, one_device_mesh())
    model = nnx.merge(model_structure(config), state.params, state.router_bias)
    save_file(dict(to_hf_tensors(model, config.model)), folder / "model.safetensors", metadata={"format": "pt"})
    settings = config_to_hf(config.model) | {"eos_token_id": None, "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps(settings))


def moejax_generate(folder: Path) -> Callable[[list[list[int]], int], list[list[int]]]:
    """Ours, on one device."""
    import moejax

    model = moejax.load(folder)
    return lambda prompts, tokens: model.answer(prompts, max_tokens=tokens, temperature=0.0).ids


def torch_generate(folder: str) -> Callable[[list[list[int]], int], list[list[int]]]:
    """That of `transformers`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="grouped_mm")
    model.eval()

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return out[:, ids.shape[1] :].tolist()

    return generate


if __name__ == "__main__":
    main()
