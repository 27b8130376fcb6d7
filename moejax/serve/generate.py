"""Answers to a batch of prompts: the loop on the host around the compiled steps.

A model sees as many tokens as it was trained on, `context`. When a row is longer, its oldest tokens are forgotten so
that the newest half of the context is left, and the rest is computed again: what a row says depends on its own
prompt and seed alone, not on the batch, nor on whether there are drafts, but for rounding.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from moejax.config import ConfigError
from moejax.serve.engine import Engine, Shape
from moejax.serve.rows import Rows
from moejax.serve.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is asked for of each prompt."""

    max_tokens: int = 200  # of an answer
    temperature: float = 1.0  # 0: always the likeliest token; above, scores are divided by it
    top_k: int = 0  # tokens are drawn from so many likeliest ones; 0: from all
    top_p: float = 1.0  # tokens are drawn from the likeliest that together have at least this probability
    seed: int | Sequence[int] = 0  # of each prompt; one number: of the first, the next one has the next
    stop: Sequence[str | int] = ()  # texts and ids that end an answer; they are left out, as is the end of a document
    speculative: bool = False  # the MTP modules draft tokens, which the model checks; faster, and equally distributed

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise ConfigError("max_tokens", self.max_tokens, "0 or more")
        if isinstance(self.stop, (str, int)):
            object.__setattr__(self, "stop", (self.stop,))
        if "" in self.stop:
            raise ConfigError("stop", "", "texts that are not empty, or ids")
        self.sampling  # noqa: B018 (it checks itself)

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def seeds(self, count: int) -> list[int]:
        """One for each prompt."""
        if isinstance(self.seed, (int, np.integer)):
            return [int(self.seed) + number for number in range(count)]
        if len(self.seed) != count:
            raise ConfigError("seed", list(self.seed), f"one number, or one for each of the {count} prompts")
        return list(self.seed)


@dataclass
class Speed:
    """What an answer took. Compiling is not in the seconds of the others."""

    prompt_tokens: int = 0
    tokens: int = 0  # of all answers
    steps: int = 0
    drafted: int = 0  # drafts that were checked for answers that were not at their end
    accepted: int = 0
    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    seconds: float = 0.0  # of the steps

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together, without the prompts."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def acceptance(self) -> float | None:
        """Share of the drafts that were accepted; None: there were none."""
        return self.accepted / self.drafted if self.drafted else None

    def __str__(self) -> str:
        """One line."""
        line = f"{self.tokens} tokens in {self.seconds:.2f} s: {self.tokens_per_second:.1f} tokens/s"
        line += f", {1e3 * self.seconds / max(self.steps, 1):.1f} ms a step"
        if self.acceptance is not None:
            line += f", {self.acceptance:.0%} of {self.drafted} drafts accepted"
        return f"{line}; prompts: {self.prompt_tokens} tokens in {self.prefill_seconds:.2f} s"


class New(NamedTuple):
    """Tokens that have come for a prompt; `last`: no more do."""

    prompt: int
    tokens: list[int]
    last: bool


@dataclass
class _Row:
    """A prompt and what has come of its answer."""

    seen: list[int]  # tokens, without those that are forgotten
    left: int
    seed: int
    count: int = 0  # tokens of the answer

    @property
    def done(self) -> bool:
        return self.left == 0


@dataclass
class Generation:
    """The answers to some prompts, as they come; iterate over it once. `stop(n)` ends the answer to a prompt early."""

    engine: Engine
    prompts: Sequence[Sequence[int]]  # each at least one id
    options: Options
    context: int
    stops: frozenset[int]  # ids
    speed: Speed = field(default_factory=Speed)

    def __post_init__(self) -> None:
        seeds = self.options.seeds(len(self.prompts))
        self._rows = [_Row(list(p), self.options.max_tokens, s) for p, s in zip(self.prompts, seeds, strict=True)]
        self.speed.prompt_tokens = sum(map(len, self.prompts))
        depth = self.engine.cfg.mtp.depth if self.options.speculative else 0
        self._longest = max(map(len, self.prompts), default=1)
        most = min(self._longest + self.options.max_tokens, self.context)
        self._shape = Shape.of(
            len(self._rows), min(self._longest, most), most, depth, self.options.sampling.kind, self.engine.shards
        )

    def stop(self, prompt: int) -> None:
        """The answer to this prompt has ended."""
        self._rows[prompt].left = 0

    def __iter__(self) -> Iterator[New]:
        """Each step's tokens."""
        if self.options.max_tokens == 0:
            yield from (New(number, [], True) for number in range(len(self._rows)))
        while any(not row.done for row in self._rows):
            yield from self._until_a_row_is_full(self._filled())

    def _filled(self) -> Rows:
        """All rows on the devices, their prompts in the caches."""
        shape, rows = self._shape, self._rows
        for row in rows:
            if len(row.seen) > self.context:
                row.seen = row.seen[-max(self.context // 2, 1) :]
        tokens = np.zeros((shape.rows, shape.slots), np.int32)
        length, number = np.ones(shape.rows, np.int32), np.zeros(shape.rows, np.int32)
        for i, row in enumerate(rows):
            seen = row.seen[:1] if row.done else row.seen
            tokens[i, : len(seen)] = seen
            length[i], number[i] = len(seen), row.count
        seeds = [row.seed for row in rows] + [0] * (shape.rows - len(rows))
        before = self.engine.compile_seconds
        state = self.engine.start(shape, tokens, length, number, _keys(seeds))
        self.engine.ready(shape, state)
        self.speed.compile_seconds += self.engine.compile_seconds - before
        began = time.perf_counter()
        for start in range(0, int(length.max()) - 1, shape.chunk):
            state = self.engine.prefill(shape, state, start)
        jax.block_until_ready(state)
        self.speed.prefill_seconds += time.perf_counter() - began
        return state

    def _until_a_row_is_full(self, state: Rows) -> Iterator[New]:
        """Steps until all rows are done, or one has to forget; each starts before the last one's tokens are read."""
        last, pending = time.perf_counter(), None
        while True:
            state, new = self.engine.step(self._shape, state, self.options.sampling)
            if pending is not None:
                tokens, counts = jax.device_get(pending)
                now = time.perf_counter()
                self.speed.seconds += now - last
                self.speed.steps += 1
                last = now
                yield from self._taken(tokens, counts)
                going_on = [row for row in self._rows if not row.done]
                if not going_on or any(len(row.seen) > self.context for row in going_on):
                    return
            pending = new

    def _taken(self, tokens: np.ndarray, counts: np.ndarray) -> Iterator[New]:
        """What the rows that are not done keep of a step's tokens."""
        for i, row in enumerate(self._rows):
            if row.done:
                continue
            kept = tokens[i, : counts[i]].tolist()
            self.speed.drafted += self._shape.depth
            self.speed.accepted += len(kept) - 1
            # a row forgets when it has one token more than the context, with drafts as without
            kept = kept[: min(row.left, self.context + 1 - len(row.seen))]
            ends = [place for place, token in enumerate(kept) if token in self.stops]
            kept = kept[: ends[0]] if ends else kept
            row.seen += kept
            row.count += len(kept)
            row.left = 0 if ends else row.left - len(kept)
            self.speed.tokens += len(kept)
            yield New(i, kept, row.done)


def _keys(seeds: Sequence[int]) -> np.ndarray:
    """The keys of some seeds, as numbers."""
    words = np.asarray([seed % 2**32 for seed in seeds], np.uint32)
    return np.asarray(jax.vmap(lambda seed: jax.random.key_data(jax.random.key(seed)))(words))
