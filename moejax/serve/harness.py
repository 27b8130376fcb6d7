"""A model for the evaluation harness of EleutherAI (github.com/EleutherAI/lm-evaluation-harness).

    pip install -e ".[eval]"
    python -m moejax.serve.harness run --model moejax --model_args run=runs/mine --tasks hellaswag

In Python: `lm_eval.simple_evaluate(model=Harness("runs/mine"), tasks=["hellaswag"])`; importing this file also makes
the name "moejax" known there. `run` is whatever `moejax.load` takes. What comes first in a text follows the end token,
as documents do in training.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moejax.config import ConfigError
from moejax.serve.load import Model, load
from moejax.serve.reader import Reader

Tokens = list[int]


@register_model("moejax")
class Harness(TemplateLM):
    """Answers the harness's three kinds of requests."""

    def __init__(
        self,
        run: str | Model,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """Loads the model.

        Args:
            run: run folder, checkpoint or Hugging Face folder, or a model that is loaded.
            batch_size: texts that are read at a time.
            max_length: tokens that the model reads at most, of a longer text the last; None: its context.
            max_gen_toks: tokens of an answer at most, where the task does not say.
            max_batch_size: what the harness says for other models.
            device: the same; JAX chooses.

        Raises:
            ConfigError: nothing can be loaded, or it has no tokenizer.
        """
        super().__init__()
        model = run if isinstance(run, Model) else load(run)
        if model.tokenizer is None:
            raise ConfigError("run", str(run), "a model whose folder has a tokenizer.json")
        self.model, self.text = model, model.tokenizer
        self.max_length, self.max_gen_toks = max_length or model.context, max_gen_toks
        self._rows, self._read = int(batch_size) if str(batch_size).isdigit() else 8, Reader(model)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.text.end_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> Tokens:
        """The ids of a text; never special ones."""
        return self.text.encode(string)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows of which each token is in one."""
        windows, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            cut = get_rolling_token_windows(self.text.encode(text), self.eot_token_id, self.max_length, context_len=1)
            own = list(map(make_disjoint_window, cut))
            windows += own
            owners += [number] * len(own)
        sums = [0.0] * len(requests)
        for number, (log_prob, _) in zip(owners, self._judged(windows), strict=True):
            sums[number] += log_prob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model says after each prompt, until one of the words that end it."""
        return [self._answer(*request.args) for request in requests]

    def _answer(self, prompt: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        sampled = options.get("do_sample", False)
        text = self.model.generate(
            prompt,
            max_tokens=options.get("max_gen_toks", self.max_gen_toks),
            temperature=float(options.get("temperature") or 1.0) if sampled else 0.0,
            top_p=float(options.get("top_p", 1.0)),
        )
        assert isinstance(text, str)
        for end in [until] if isinstance(until, str) else until:
            text = text.split(end)[0] if end else text
        return text

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], Tokens, Tokens]], **options: Any
    ) -> list[tuple[float, bool]]:
        return self._judged([(context, continuation) for _, context, continuation in requests])

    def _judged(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether each of its tokens is the likeliest.

        Of what does not fit the last tokens are read. Sizes are powers of two, so that few programs are compiled.
        """
        rows = [(*context, *continuation)[-self.max_length - 1 :] for context, continuation in pairs]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda index: -len(rows[index]))
        for first in range(0, len(order), self._rows):
            own = order[first : first + self._rows]
            longest = max(len(rows[own[0]]) - 1, 1)
            tokens = np.zeros((self._rows, min(1 << (longest - 1).bit_length(), self.max_length) + 1), np.int32)
            for row, index in enumerate(own):
                tokens[row, : len(rows[index])] = rows[index]
            reading = self._read(tokens)
            for row, index in enumerate(own):
                past = len(rows[index]) - 1
                judged = slice(max(past - len(pairs[index][1]), 0), past)
                log_prob = -float(reading.nats[row, judged].sum(dtype=np.float64))
                found[index] = log_prob, bool(reading.best[row, judged].all())
        return found


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
