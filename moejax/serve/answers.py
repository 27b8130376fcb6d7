"""Answers as text: the prompts' tokens in, the pieces of the answers out as they come."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from moejax.config import ConfigError
from moejax.data.tokens import Tokenizer
from moejax.serve.engine import Engine
from moejax.serve.generate import Generation, Options, Speed
from moejax.serve.text import TextStream

logger = logging.getLogger("moejax")

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Answers:
    """What a model has said."""

    texts: list[str] | None  # None: the model has no tokenizer
    ids: list[list[int]]  # with those of a text that ended the answer; without an id that did
    ended: list[Literal["stop", "length"]]  # by a token or text that ends answers, or by max_tokens
    speed: Speed


class Stream:
    """Answers while they come: iterating gives `(number of the prompt, piece of text)`. Then they are in `answers`."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer | None, context: int, prompts: Sequence[Prompt], options: Options
    ):
        ids = [_ids(prompt, tokenizer, engine.cfg.vocab_size) for prompt in prompts]
        texts = [stop for stop in options.stop if isinstance(stop, str)]
        if texts and tokenizer is None:
            raise ConfigError("stop", texts[0], "ids, as the model's folder has no tokenizer.json")
        if options.speculative and not engine.cfg.mtp.depth:
            raise ConfigError("speculative", True, "a model with MTP modules, which draft; this one has none")
        stops = frozenset(stop for stop in options.stop if isinstance(stop, int))
        if tokenizer is not None:
            stops |= {tokenizer.end_id}
        _tell_of_length(max(map(len, ids), default=0), options.max_tokens, context)
        self._generation = Generation(engine, ids, options, context, stops)
        self._streams = [TextStream(tokenizer, texts) for _ in ids] if tokenizer is not None else None
        self._ids: list[list[int]] = [[] for _ in ids]
        self._most = options.max_tokens

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """The pieces; empty ones where the model has no tokenizer."""
        for new in self._generation:
            self._ids[new.prompt] += new.tokens
            if self._streams is None:
                yield new.prompt, ""
                continue
            stream = self._streams[new.prompt]
            piece = stream.add(new.tokens)
            if new.last:
                piece += stream.finish()
            elif stream.ended:
                self._generation.stop(new.prompt)
            if piece:
                yield new.prompt, piece

    @property
    def speed(self) -> Speed:
        """What it has taken so far."""
        return self._generation.speed

    @property
    def answers(self) -> Answers:
        """What has come so far."""
        streams = self._streams
        texts = None if streams is None else [stream.text for stream in streams]
        by_text = [False] * len(self._ids) if streams is None else [stream.ended for stream in streams]
        ended: list[Literal["stop", "length"]] = [
            "stop" if cut or len(ids) < self._most else "length" for cut, ids in zip(by_text, self._ids, strict=True)
        ]
        return Answers(texts, self._ids, ended, self.speed)


def _ids(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ConfigError("prompt", prompt, "ids, or a model whose folder has a tokenizer.json")
        return tokenizer.encode(prompt) or [tokenizer.end_id]  # which stands before every document
    ids = [int(index) for index in prompt]
    if not ids:
        raise ConfigError("prompt", ids, "at least one token")
    wrong = [index for index in ids if not 0 <= index < vocab_size]
    if wrong:
        raise ConfigError("prompt", wrong[0], f"ids from 0 to {vocab_size - 1}")
    return ids


def _tell_of_length(prompt: int, answer: int, context: int) -> None:
    """A line where more tokens may come than the model was trained on."""
    if prompt + answer > context + 1:
        least = max(context // 2, 1)
        logger.warning(
            f"{prompt} + {answer} tokens are more than the {context} that the model was trained on: "
            f"it sees the newest {least} to {context} of them"
        )
