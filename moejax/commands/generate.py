"""`moejax generate RUN --prompt TEXT ...`: text from a trained model, printed as it comes."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moejax.commands.parser import Parser
from moejax.config import MeshConfig, RunConfig
from moejax.config_source import override

if TYPE_CHECKING:
    from moejax.serve.answers import Answers
    from moejax.serve.generate import Speed
    from moejax.serve.load import Model


def generate_command(words: Sequence[str]) -> int:
    """Prints the answers on stdout and what they took on stderr. Returns the exit code."""
    options, mesh = _options(words)
    if options.simulate:
        from moejax.mesh import simulate

        simulate(options.simulate)
    from moejax.serve.load import load

    model, asked = load(options.run, mesh), _asked(options)
    answers = _answered(model, options, asked)
    rows = {"speculative" if options.speculative else "plain": answers.speed}
    if options.compare:
        rows |= {"plain": model.answer(options.prompt, **asked | {"speculative": False}).speed}
    if options.json:
        print(json.dumps(_facts(options.prompt, answers, rows)))
    for name, speed in rows.items():
        print(f"{name}: {speed}" if len(rows) > 1 else speed, file=sys.stderr)
    return 0


def _answered(model: "Model", options: argparse.Namespace, asked: dict[str, Any]) -> "Answers":
    """The answers; one is printed as it comes, several one after the other when all are there."""
    stream = model.answering(options.prompt, **asked)
    alone = len(options.prompt) == 1 and not options.json
    if alone:
        print(options.prompt[0], end="", flush=True)
    for _, piece in stream:
        if alone:
            print(piece, end="", flush=True)
    answers = stream.answers
    if alone:
        print()
    elif not options.json:
        for prompt, text in zip(options.prompt, answers.texts or [], strict=True):
            print(prompt + text)
    return answers


def _facts(prompts: list[str], answers: "Answers", rows: dict[str, "Speed"]) -> dict[str, Any]:
    texts = answers.texts or [""] * len(prompts)
    each = [
        {"prompt": prompt, "text": text, "ids": ids, "ended": ended}
        for prompt, text, ids, ended in zip(prompts, texts, answers.ids, answers.ended, strict=True)
    ]
    return {"answers": each, "speed": {name: _as_json(speed) for name, speed in rows.items()}}


def _as_json(speed: "Speed") -> dict[str, Any]:
    more = {"tokens_per_second": speed.tokens_per_second, "acceptance": speed.acceptance}
    return dataclasses.asdict(speed) | more


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    names = ("max_tokens", "temperature", "top_k", "top_p", "stop", "speculative")
    seed = options.seed[0] if len(options.seed) == 1 else options.seed
    return {name: getattr(options, name) for name in names} | {"seed": seed}


def _options(words: Sequence[str]) -> tuple[argparse.Namespace, MeshConfig | None]:
    """The command's words, and the mesh that they ask for; None: one device."""
    parser = Parser(
        "generate", "Continues prompts with a trained model; --mesh.FIELD as of train, all else one device."
    )
    parser.add_argument("run", metavar="RUN", help="run folder, checkpoint or Hugging Face folder")
    parser.add_argument("--prompt", nargs="+", default=[""], metavar="TEXT", help="start of the text, or of several")
    parser.add_argument("--max-tokens", type=int, default=200, help="tokens that are added at most")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the most likely token")
    parser.add_argument("--top-k", type=int, default=0, help="sample among so many likeliest; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest that hold this share")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="of the first prompt, or one for each")
    parser.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="texts that end an answer")
    parser.add_argument("--speculative", action="store_true", help="let the model's MTP modules draft tokens")
    parser.add_argument("--compare", action="store_true", help="answer again without drafts, and say what both took")
    parser.add_argument("--simulate", type=int, metavar="N", help="CPU devices to simulate")
    parser.add_argument("--json", action="store_true", help="print answers, ids and times as JSON")
    options, rest = parser.parse_known_args(list(words))
    if any(word.startswith("-") and not word.startswith("--mesh.") for word in rest) or (rest and rest[0][0] != "-"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.compare and not options.speculative:
        parser.error("--compare without --speculative")
    mesh = override(RunConfig(steps=1), rest).mesh
    return options, mesh if rest or options.simulate else None
