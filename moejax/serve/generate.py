"""Sampling text from a model, one token at a time, each from a whole forward pass over its context."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from moejax.config import ConfigError


def sample_tokens(
    next_scores: Callable[[np.ndarray, int], Float[Array, "V"]],
    prompt: Sequence[int],
    *,
    max_tokens: int,
    context: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | None = None,
) -> list[int]:
    """Ids that continue the prompt: at most `max_tokens`, fewer if `stop` comes, which is left out.

    Args:
        next_scores: (tokens int32 [1, S], index of the last one) -> scores of the token after it.
        prompt: at least one id.
        max_tokens: of the answer.
        context: newest tokens that the model sees.
        temperature: 0 takes the likeliest token; above, scores are divided by it.
        top_p: tokens are drawn from the likeliest that together have at least this probability.
        seed: the same seed gives the same tokens.
        stop: id that ends the answer.

    Raises:
        ConfigError: a temperature below 0, a top_p outside of (0, 1], an empty prompt.
    """
    _check(prompt, temperature, top_p)
    ids = list(prompt)
    key = jax.random.key(seed)
    for index in range(max_tokens):
        window = ids[-context:]
        size = min(context, 1 << (len(window) - 1).bit_length())  # few sizes, so that few programs are compiled
        padded = np.zeros((1, size), np.int32)
        padded[0, : len(window)] = window
        scores_V = next_scores(padded, len(window) - 1)
        token = int(_draw(scores_V, jax.random.fold_in(key, index), temperature, top_p))
        if token == stop:
            break
        ids.append(token)
    return ids[len(prompt) :]


def _check(prompt: Sequence[int], temperature: float, top_p: float) -> None:
    if not prompt:
        raise ConfigError("prompt", "", "at least one token; this tokenizer adds none of its own")
    if not temperature >= 0:
        raise ConfigError("temperature", temperature, "0 or more")
    if not 0 < top_p <= 1:
        raise ConfigError("top_p", top_p, "above 0, at most 1")


@jax.jit
def _draw(scores_V: Float[Array, "V"], key: Array, temperature: float, top_p: float) -> Int[Array, ""]:
    """One id; the likeliest where the temperature is 0."""
    scaled_V = scores_V / jnp.where(temperature > 0, temperature, 1.0)
    order_V = jnp.argsort(-scaled_V)
    probs_V = jax.nn.softmax(scaled_V)[order_V]
    before_V = jnp.cumsum(probs_V) - probs_V  # probability of all that are likelier
    kept_V = jnp.where(before_V < top_p, scaled_V[order_V], -jnp.inf)
    drawn = order_V[jax.random.categorical(key, kept_V)]
    return jnp.where(temperature > 0, drawn, order_V[0])
