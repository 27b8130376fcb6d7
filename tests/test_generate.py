import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax.config import ConfigError
from moejax.serve.generate import sample_tokens

SCORES = np.log(np.asarray([0.5, 0.3, 0.15, 0.05]))


def fixed(scores=SCORES):
    """A model that does not look at its tokens."""
    return lambda tokens, last: jnp.asarray(scores, jnp.float32)


def draw(count=400, **options):
    options = {"max_tokens": count, "context": 8, "seed": 1, **options}
    return np.bincount(sample_tokens(fixed(), [0], **options), minlength=4) / count


def test_temperature_0_takes_the_likeliest():
    assert draw(temperature=0.0)[0] == 1


def test_samples_follow_the_probabilities():
    """400 draws: the share of a token with probability p has the standard deviation sqrt(p (1 - p) / 400) <= 0.025."""
    np.testing.assert_allclose(draw(), np.exp(SCORES), atol=4 * 0.025)


@pytest.mark.parametrize("top_p, kept", [(0.4, 1), (0.6, 2), (0.81, 3), (1.0, 4)])
def test_top_p_keeps_the_likeliest(top_p, kept):
    shares = draw(top_p=top_p)
    assert (shares > 0).sum() == kept and shares[kept:].sum() == 0


def test_seed_decides_the_tokens():
    sample = lambda seed: sample_tokens(fixed(), [0], max_tokens=30, context=8, seed=seed)  # noqa: E731
    assert sample(3) == sample(3) != sample(4)


def test_model_sees_the_newest_tokens_and_stop_ends():
    seen = []

    def next_scores(tokens, last):
        seen.append(tokens[0, : last + 1].tolist())
        return jnp.asarray(np.eye(10)[min(len(seen) + 4, 8)] * 100, jnp.float32)

    assert sample_tokens(next_scores, [1, 2, 3], max_tokens=20, context=4, stop=8) == [5, 6, 7]
    assert seen == [[1, 2, 3], [1, 2, 3, 5], [2, 3, 5, 6], [3, 5, 6, 7]]


@pytest.mark.parametrize(
    "options, error",
    [
        ({"temperature": -1.0}, "temperature=-1.0: wanted 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan: wanted 0 or more"),
        ({"top_p": 0.0}, "top_p=0.0: wanted above 0, at most 1"),
    ],
)
def test_settings_that_do_not_fit_are_named(options, error):
    with pytest.raises(ConfigError, match=error):
        sample_tokens(fixed(), [0], max_tokens=1, context=8, **options)


def test_loaded_run_gives_the_loss_it_was_validated_with(run_config):
    """Logits of the loaded model, through its own softmax, against the validation loss that training printed."""
    result = moejax.train(run_config, devices=jax.devices()[:1])
    model, same = moejax.load(result.folder), moejax.load(result.folder / "checkpoints" / "6")
    from moejax.data.dataset import open_data

    data = open_data(run_config.data, vocab_size=264, seed=0, cache=result.folder.parent / "tokens")
    (batch,) = data.valid_batches(1, run_config.data.batch_size)
    data.train.close()
    logits = model.logits(batch.tokens[:, :-1])
    assert logits.shape == (4, 32, 264) and logits.dtype == np.float32
    np.testing.assert_array_equal(same.logits(batch.tokens[:, :-1]), logits)
    log_probs = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_probs, batch.tokens[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(-picked[batch.loss_mask[:, 1:]].mean(), result.valid_loss, rtol=1e-5)
    text = model.generate("route each", max_tokens=5, temperature=0.0)
    assert text == model.generate("route each", max_tokens=5, temperature=0.0)


def test_load_names_what_is_missing(tmp_path, run_config):
    with pytest.raises(ConfigError, match="wanted a run folder, one of its checkpoints"):
        moejax.load(tmp_path)
    (tmp_path / "config.json").write_text(run_config.to_json())
    with pytest.raises(ConfigError, match="there is no checkpoint yet"):
        moejax.load(tmp_path)
