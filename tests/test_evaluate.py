"""`moejax eval` and `moejax.evaluate`, against softmaxes of `Model.logits` written out here."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_export import save

import moejax
from moejax.cli import main
from moejax.config import ConfigError, DataConfig, MeshConfig
from moejax.ops.placement import rebalance_experts
from moejax.serve.evaluate import evaluate
from moejax.serve.placed import with_placement
from moejax.serve.reader import Reader

END = 257
LENGTH = 16


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def run(run_config, shared):
    """A run that did no step, whose routers' biases differ; made once for all tests."""
    if not (shared / "run").exists():
        save(dataclasses.replace(run_config, out=str(shared / "run"), mesh=MeshConfig(data=1)))
    return shared / "run"


@pytest.fixture
def text(shared):
    """Two domains: a file, and a folder of two documents."""
    (shared / "text" / "names").mkdir(parents=True, exist_ok=True)
    (shared / "text" / "words.txt").write_text("route each token to a few experts and drop none")
    (shared / "text" / "names" / "a.txt").write_text("Ada, Grace, Edsger")
    (shared / "text" / "names" / "b.txt").write_text("Barbara and Alan and Émile")
    return shared / "text"


def tokens_of(*texts):
    return np.concatenate([[*text.encode(), END] for text in texts])


def naive_nats(model, rows):
    """Of each row the cross entropies of all its tokens but the first; shorter rows are filled up and cut again."""
    longest = LENGTH + 1
    padded = np.zeros((len(rows), longest), np.int32)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    scores = model.logits(padded).astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    log_probs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return [-log_probs[n, np.arange(len(row) - 1), row[1:]] for n, row in enumerate(rows)]


@pytest.mark.parametrize("stride", [LENGTH, 5, LENGTH + 1], ids=["each token once", "sliding", "rows of training"])
def test_loss_is_that_of_the_logits(run, text, stride):
    model = moejax.load(run)
    found = evaluate(model, [text / "words.txt"], length=LENGTH, stride=stride, rows=3)
    tokens = tokens_of((text / "words.txt").read_text())
    rows, asked, done = [], [], 0
    for start in range(0, len(tokens), stride):
        row = tokens[start : start + LENGTH + 1]
        if start + len(row) > done + 1 and len(row) > 1:
            rows.append(row)
            asked.append(np.arange(start + 1, start + len(row)) > done)
            done = start + len(row) - 1
    nats = np.concatenate([n[a] for n, a in zip(naive_nats(model, rows), asked, strict=True)])
    predicted = len(tokens) - 1 - (2 if stride > LENGTH else 0)
    (domain,) = found.domains
    assert domain.score.tokens == len(nats) == predicted
    np.testing.assert_allclose(domain.score.loss, nats.mean(), rtol=1e-5)
    np.testing.assert_allclose(domain.score.perplexity, math.exp(nats.mean()), rtol=1e-4)
    assert domain.score.bytes == predicted - 1  # all but the end token
    np.testing.assert_allclose(domain.score.bits_per_byte, nats.sum() / math.log(2) / (predicted - 1), rtol=1e-5)


def test_documents_are_read_apart_if_they_were_in_training(run, text):
    """Neither is the first token of a document predicted, nor does its text see the document before."""
    reading = DataConfig(mask_documents=True)
    model = moejax.load(run)
    (domain,) = evaluate(model, [text / "names"], length=64, reading=reading).domains
    names = [(text / "names" / name).read_text() for name in ("a.txt", "b.txt")]
    rows = [tokens_of(name) for name in names]
    padded = np.zeros((2, 64), np.int32)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    scores = model.logits(padded).astype(np.float64)
    log_probs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    nats = np.concatenate([-log_probs[n, np.arange(len(row) - 1), row[1:]] for n, row in enumerate(rows)])
    assert domain.score.tokens == sum(map(len, rows)) - 2
    np.testing.assert_allclose(domain.score.loss, nats.mean(), rtol=1e-5)


def test_domains_are_files_and_folders_and_have_experts_of_their_own(run, text, capsys):
    assert main(["eval", str(run), str(text), "--length", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [domain["name"] for domain in found["domains"]]
    assert names == [str(text / "names"), str(text)]
    sizes = [
        len(tokens_of(*(path.read_text() for path in sorted(folder.glob("*.txt")))))
        for folder in map(type(text), names)
    ]
    assert [domain["score"]["tokens"] for domain in found["domains"]] == [size - 1 for size in sizes]
    assert found["total"]["tokens"] == sum(sizes) - 2
    losses = [domain["score"]["loss"] * domain["score"]["tokens"] for domain in found["domains"]]
    np.testing.assert_allclose(found["total"]["loss"], sum(losses) / found["total"]["tokens"], rtol=1e-9)
    model = moejax.load(run)
    tokens = tokens_of((text / "words.txt").read_text())
    experts = Reader(model)(tokens[None]).experts[:, 0]  # of all tokens that predict another
    assert experts.shape == (2, len(tokens) - 1, 2)
    for layer, share in zip(experts, found["domains"][1]["share"], strict=True):
        counts = [int((layer == expert).sum()) for expert in range(8)]
        np.testing.assert_allclose(share, np.array(counts) / sum(counts))
    for domain in found["domains"]:
        for share, entropy in zip(domain["share"], domain["entropy"], strict=True):
            np.testing.assert_allclose(entropy, -sum(p * math.log(p) for p in share if p) / math.log(8))
        for one in domain["specialists"]:
            assert one["times"] > 1 and one["share"] == domain["share"][one["layer"] - 1][one["expert"]]


def test_the_experts_that_are_read_are_those_that_the_layers_count(run):
    """The same router, asked twice."""
    tokens = np.random.default_rng(0).integers(256, size=(2, 17)).astype(np.int32)
    model = moejax.load(run)
    experts = Reader(model)(tokens).experts
    module = jax.tree.map(np.asarray, model.module)  # on no mesh, as a test calls it
    count = jax.jit(lambda module, tokens: module.hidden(module.embed(tokens, jnp.float32), None)[1][0].counts)
    counts = count(module, tokens[:, :-1])
    np.testing.assert_array_equal([np.bincount(layer.ravel(), minlength=8) for layer in experts], counts)


def test_precision_is_that_of_the_run_or_another(run, text, tmp_path, capsys):
    """FP8 moves every loss a little, of a run as of its weights in a Hugging Face folder."""
    hf = tmp_path / "hf"
    assert main(["export-hf", str(run), str(hf), "--dtype", "fp32"]) == 0

    def loss(folder, *words):
        capsys.readouterr()
        assert main(["eval", str(folder), str(text / "words.txt"), "--length", "16", "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)["total"]["loss"]

    exact = loss(run)  # a run in FP32
    assert loss(run, "--precision", "fp32") == exact
    np.testing.assert_allclose(loss(hf), exact, rtol=1e-6)
    bf16, fp8 = (loss(run, "--precision", precision) for precision in ("bf16", "fp8"))
    assert len({exact, bf16, fp8}) == 3
    np.testing.assert_allclose([bf16, fp8], exact, rtol=2.0**-7)
    for precision, want in (("bf16", bf16), ("fp8", fp8)):
        np.testing.assert_allclose(loss(hf, "--precision", precision), want, rtol=1e-6)


def test_precision_that_cannot_be_is_named(run, text):
    with pytest.raises(ConfigError, match="precision='fp16': wanted one of bf16, fp32, fp8"):
        moejax.load(run, precision="fp16")
    with pytest.raises(ConfigError, match="precision='fp8': wanted none where the model is loaded already"):
        evaluate(moejax.load(run), [text / "words.txt"], precision="fp8")


def test_a_table_is_printed(run, text, capsys, monkeypatch):
    monkeypatch.chdir(text)
    assert main(["eval", str(run), "words.txt", "--length", "16"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"words.txt +│ +47 │", out) and "windows of 16 tokens that move by 16" in out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nowhere.txt"], "DATA='nowhere.txt': wanted a file, a folder or a glob that exists"),
        (["WORDS", "--stride", "18", "--length", "16"], "stride=18: wanted at most 17"),
        (["WORDS", "--length", "0"], "length=0: wanted a number above 0"),
        (["WORDS", "WORDS"], "DATA=.*: wanted each domain once"),
        ([], "DATA"),
    ],
    ids=["no file", "stride", "length", "twice", "no data"],
)
def test_bad_input_is_one_line(run, text, capsys, words, line):
    words = [str(text / "words.txt") if word == "WORDS" else word for word in words]
    assert main(["eval", str(run), *words]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(line, said), said


def test_a_model_without_a_tokenizer_is_named(run, text):
    model = dataclasses.replace(moejax.load(run), tokenizer=None)
    with pytest.raises(ConfigError, match="a model whose folder has a tokenizer"):
        evaluate(model, [text / "words.txt"])


def test_a_model_with_replicated_experts_gives_the_same_logits(run):
    """8 experts in 12 places, another placement in each layer, the MTP module's last."""
    model = moejax.load(run)
    load = np.random.default_rng(1).random((3, 8))
    placement = rebalance_experts(load, 12, num_groups=1, num_nodes=1, num_gpus=4)
    placed = with_placement(model, placement)
    assert placed.module.moe_blocks.ffn.gate_up_EDG.shape == (2, 12, 32, 32)
    assert model.module.moe_blocks.ffn.gate_up_EDG.shape == (2, 8, 32, 32)
    tokens = np.random.default_rng(2).integers(256, size=(2, 24)).astype(np.int32)
    want = model.logits(tokens)
    np.testing.assert_allclose(placed.logits(tokens), want, rtol=0, atol=2e-6 * np.abs(want).max())
    with pytest.raises(ConfigError, match=r"one of 3 layers with 8 experts"):
        with_placement(model, rebalance_experts(load[:2], 12, 1, 1, 4))
