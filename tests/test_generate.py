"""Answers of a whole model: against the forward pass without a cache, with drafts, on meshes, and as text."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
from test_mtp import CFG, draw

import moejax
from moejax.config import ONE_DEVICE, ConfigError, DataConfig, MeshConfig, MTPConfig, RunConfig
from moejax.data.tokens import Tokenizer
from moejax.mesh import make_mesh
from moejax.model.decoder import taken_apart
from moejax.ops.placement import rebalance_experts
from moejax.serve.engine import Engine, Shape
from moejax.serve.load import from_state
from moejax.serve.placed import with_placement
from moejax.train.state import abstract_state

VOCAB, CONTEXT, MOST = 8, 48, 24
PROMPTS = ([3, 1, 4], [1], [5, 2, 6, 5, 3, 5, 1, 2, 3, 1, 7, 2, 4, 6, 1, 2, 3, 4])


class Letters(Tokenizer):
    """Ids 0 to 7 are a to h; the end is an id that the model does not have."""

    vocab_size, end_id = VOCAB + 1, VOCAB

    def encode_batch(self, texts):
        return [np.asarray([ord(letter) - ord("a") for letter in text], np.int64) for text in texts]

    def decode(self, ids):
        return "".join(chr(ord("a") + index) for index in ids)


def made(depth=1, mesh=ONE_DEVICE):
    """A model with random weights; its few tokens make drafts right now and then."""
    attention = dataclasses.replace(CFG.attention, q_lora_rank=8, kv_lora_rank=8)
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_layers": 1, "num_dense_layers": 0}
    cfg = dataclasses.replace(CFG, **sizes, attention=attention, mtp=MTPConfig(depth=depth))
    data = DataConfig(sequence_length=CONTEXT, batch_size=8)
    config = RunConfig(steps=1, precision="fp32", model=cfg, mesh=mesh, data=data)
    devices = make_mesh(mesh, jax.devices()[: mesh.batch_shards])
    like, drawn = abstract_state(config, devices), draw(cfg)[1:3]
    placed = [
        jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), *pair)
        for pair in zip(drawn, (like.params, like.router_bias), strict=True)
    ]
    return from_state(config, devices, *placed, Letters())


@pytest.fixture(scope="module")
def model():
    return made()


def answer(model, prompts=PROMPTS, **options):
    return model.answer(prompts, **{"max_tokens": MOST, "temperature": 0.0, **options})


def likeliest(model, prompt, context=CONTEXT):
    """One token after the other, each from a whole forward pass."""
    seen, said = list(prompt), []
    while len(said) < MOST:
        seen = seen[-(context // 2) :] if len(seen) > context else seen
        padded = np.pad(np.asarray(seen, np.int32), (0, CONTEXT - len(seen)))
        token = int(model.logits(padded[None])[0, len(seen) - 1].argmax())
        seen.append(token)
        said.append(token)
    return said


@pytest.fixture(scope="module")
def wanted(model):
    return [likeliest(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("speculative", [False, True], ids=["plain", "with drafts"])
def test_batch_of_prompts_of_different_lengths_matches_the_forward_pass(model, wanted, speculative):
    got = answer(model, speculative=speculative)
    assert got.ids == wanted and got.ended == ["length"] * 3
    speed = got.speed
    assert speed.tokens == sum(map(len, wanted)) and speed.prompt_tokens == sum(map(len, PROMPTS))
    if speculative:
        assert 0 < speed.accepted < speed.drafted and speed.acceptance == speed.accepted / speed.drafted
    else:
        assert speed.drafted == 0 and speed.acceptance is None


@pytest.mark.slow
def test_chain_of_drafts_matches_the_forward_pass():
    model = made(depth=2)
    got = answer(model, speculative=True)
    assert got.ids == [likeliest(model, prompt) for prompt in PROMPTS]
    assert 0 < got.speed.accepted < got.speed.drafted


@pytest.mark.parametrize("speculative", [False, True], ids=["plain", "with drafts"])
def test_what_is_older_than_the_context_is_forgotten_and_said(model, speculative, caplog):
    """Each row forgets when its own length says so: the same in a batch, alone, and with drafts."""
    short = dataclasses.replace(model, context=12)
    with caplog.at_level(logging.WARNING, logger="moejax"):
        got = answer(short, stop=(), speculative=speculative)
    assert got.ids == [likeliest(model, prompt, context=12) for prompt in PROMPTS]
    (line,) = (record.getMessage() for record in caplog.records)
    assert (
        line == "18 + 24 tokens are more than the 12 that the model was trained on: it sees the newest 6 to 12 of them"
    )


@pytest.mark.parametrize("speculative", [False, True], ids=["plain", "with drafts"])
def test_tokens_have_the_probabilities_of_the_forward_pass(model, speculative):
    """The first two tokens of 1200 answers, pair by pair; the deviation of a share is sqrt(p (1 - p) / n)."""
    count, prompt = 1200, [3, 1, 4]
    settings = {"max_tokens": 2, "temperature": 0.7, "speculative": speculative}
    ids = model.answer([prompt] * count, seed=range(count), **settings).ids
    padded = np.zeros((VOCAB, 5), np.int32)
    padded[:, :3], padded[:, 3] = prompt, np.arange(VOCAB)
    scores = model.logits(padded) / 0.7
    probs = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    pairs = probs[0, 2][:, None] * probs[:, 3]
    seen = np.zeros((VOCAB, VOCAB))
    np.add.at(seen, tuple(np.asarray(ids).T), 1)
    np.testing.assert_array_less(np.abs(seen / count - pairs), 4.5 * np.sqrt(pairs * (1 - pairs) / count) + 1e-12)


def test_answer_depends_on_its_own_prompt_and_seed_alone(model):
    settings = {"temperature": 1.0, "max_tokens": MOST}
    together = model.answer(PROMPTS, seed=[5, 6, 7], **settings).ids
    assert together == model.answer(PROMPTS, seed=5, **settings).ids
    alone = [
        model.answer([prompt], seed=seed, **settings).ids[0] for prompt, seed in zip(PROMPTS, (5, 6, 7), strict=True)
    ]
    assert alone == together != model.answer(PROMPTS, seed=6, **settings).ids


def test_nothing_is_compiled_while_tokens_come(model):
    """Nor for another batch of the same sizes: a first program of a new size shows that compiling is counted."""
    compiled = []
    listen = lambda event, seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x * 3 + 1)(np.zeros((7, 11, 13)))
        assert compiled
        answer(model)
        compiled.clear()
        answer(model, [[2, 1], [7], [6] * 18], max_tokens=MOST - 4)
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_texts_and_ids_end_an_answer(model, wanted):
    asked, prompts = {"max_tokens": MOST, "temperature": 0.0}, [Letters().decode(prompt) for prompt in PROMPTS]
    texts = [Letters().decode(ids) for ids in wanted]
    assert model.generate(prompts, **asked) == texts and model.generate(prompts[0], **asked) == texts[0]
    assert list(model.stream(prompts[0], **asked)) == list(texts[0])  # a letter is a token
    stops = [texts[0][3:5], texts[1][6:8], texts[2][2:4]]
    cut = [min(text.index(stop) for stop in stops if stop in text) for text in texts]
    got = model.answer(prompts, stop=stops, **asked)
    assert got.texts == [text[:end] for text, end in zip(texts, cut, strict=True)] and got.ended == ["stop"] * 3
    end = wanted[0][4]
    assert answer(model, stop=end).ids == [ids[: ids.index(end)] if end in ids else ids for ids in wanted]
    assert model.answer([], **asked).ids == [] and model.answer(PROMPTS, max_tokens=0).ids == [[], [], []]


@pytest.mark.parametrize(
    "prompts, options, error",
    [
        (["a"], {"temperature": -1.0}, "temperature=-1.0: wanted 0 or more"),
        (["a"], {"max_tokens": -1}, "max_tokens=-1: wanted 0 or more"),
        (["a", "b"], {"seed": [1]}, "wanted one number, or one for each of the 2 prompts"),
        ([[1], []], {}, "wanted at least one token"),
        ([[1, 8]], {}, "prompt=8: wanted ids from 0 to 7"),
        (["a"], {"stop": ["b", ""]}, "wanted texts that are not empty"),
    ],
)
def test_settings_that_do_not_fit_are_named(model, prompts, options, error):
    with pytest.raises(ConfigError, match=error):
        model.answer(prompts, **options)


def test_what_a_model_does_not_have_is_named(model):
    without = dataclasses.replace(model, tokenizer=None)
    assert answer(without, [[3, 1, 4]]).texts is None
    for call in (lambda: without.generate("a"), lambda: without.answer([[1]], stop=["b"])):
        with pytest.raises(ConfigError, match=r"tokenizer\.json"):
            call()
    with pytest.raises(ConfigError, match="wanted a model with MTP modules"):
        made(depth=0).answer(["a"], speculative=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=2, expert=2),
        MeshConfig(data=2, expert=2, sharding="fsdp"),
        MeshConfig(replica=2, data=2, expert=2, sharding="hsdp"),
        MeshConfig(data=1, expert=2, exchange_slack=0.1),
    ],
    ids=["zero1", "fsdp", "hsdp", "several rounds of the exchange"],
)
def test_mesh_answers_as_one_device(mesh, wanted):
    """Three prompts, which do not divide over the devices."""
    spread = made(mesh=mesh)
    for speculative in (False, True):
        assert answer(spread, speculative=speculative).ids == wanted


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
    spread = moejax.load(result.folder, mesh=MeshConfig(data=-1, expert=4))
    assert spread.mesh.size == 8 and spread.generate("route each", max_tokens=5, temperature=0.0) == text
    with pytest.raises(ConfigError, match=r"mesh\.pipe=2: wanted 1"):
        moejax.load(result.folder, mesh=MeshConfig(pipe=2))


@pytest.mark.parametrize("depth", [0, 1], ids=["plain", "with drafts"])
def test_no_array_of_the_rows_is_empty(model, depth):
    """XLA of jax 0.11 dies of one that several devices share."""
    shape = Shape.of(2, prompt=3, tokens=8, depth=depth, kind="greedy", shards=1)
    whole = np.zeros((2, shape.slots), np.int32), *np.zeros((2, 2), np.int32), np.zeros((2, 2), np.uint32)
    engine = Engine(taken_apart(model.module, model.mesh, model.dtype), model.mesh, model.dtype)
    assert min(array.size for array in jax.tree.leaves(engine.start(shape, *whole))) > 0


def test_load_names_what_is_missing(tmp_path, run_config):
    with pytest.raises(ConfigError, match="wanted a run folder, one of its checkpoints"):
        moejax.load(tmp_path)
    (tmp_path / "config.json").write_text(run_config.to_json())
    with pytest.raises(ConfigError, match="there is no checkpoint yet"):
        moejax.load(tmp_path)


@pytest.mark.parametrize("speculative", [False, True], ids=["plain", "with drafts"])
def test_experts_that_lie_several_times_answer_the_same(model, speculative):
    experts = model.config.moe.num_experts
    load = np.random.default_rng(0).integers(1, 100, (2, experts))  # of the main layer and of the MTP module
    placed = with_placement(model, rebalance_experts(load, 2 * experts, 1, 1, 4))
    assert answer(placed, speculative=speculative).ids == answer(model, speculative=speculative).ids
