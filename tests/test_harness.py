"""The adapter for lm-eval, with tasks of its own: a YAML file each, and the documents beside it.

pip install -e ".[dev,eval]"
python -m pytest -m harness
"""

import dataclasses
import json
import math
import os

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
lm_eval = pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager  # noqa: E402
from test_export import save  # noqa: E402

import moejax  # noqa: E402
from moejax.config import MeshConfig  # noqa: E402
from moejax.serve.harness import Harness  # noqa: E402

pytestmark = pytest.mark.harness
END = 257
DOCUMENTS = [
    {"question": "route each", "choices": ["token", "expert", "none"], "answer": 0},
    {"question": "drop", "choices": ["none", "all of them"], "answer": 1},
    {"question": "a few", "choices": ["experts", "to"], "answer": 0},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
"""
TASKS = {
    "choose": ("multiple_choice", "{{question}}", "{{answer}}", 'doc_to_choice: "{{choices}}"'),
    "roll": (
        "loglikelihood_rolling",
        "",
        "{{question}}",
        "metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]",
    ),
    "say": (
        "generate_until",
        "{{question}}",
        "{{question}}",
        "generation_kwargs: {until: ['e'], max_gen_toks: 5, do_sample: false}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]",
    ),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with the tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in DOCUMENTS))
    for name, (kind, text, target, more) in TASKS.items():
        filled = TASK.format(name=name, file=folder / "documents.jsonl", kind=kind, text=text, target=target, more=more)
        (folder / f"{name}.yaml").write_text(filled)
    return folder


@pytest.fixture
def run(run_config):
    return save(dataclasses.replace(run_config, mesh=MeshConfig(data=1))).parent.parent


def naive_log_prob(model, context, continuation):
    """From the logits of the whole; and whether the continuation is what greedy decoding gives."""
    ids = [*(context.encode() or [END]), *continuation.encode()]
    first = len(ids) - len(continuation.encode())
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(ids)] = ids
    scores = model.logits(padded)[0].astype(np.float64)
    log_probs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return sum(log_probs[i - 1, ids[i]] for i in range(first, len(ids))), all(
        scores[i - 1].argmax() == ids[i] for i in range(first, len(ids))
    )


def test_a_task_of_each_kind(run, tasks):
    found = lm_eval.simple_evaluate(
        model="moejax",
        model_args={"run": str(run), "max_length": 32},
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    model = moejax.load(run)
    right = 0
    for sample, document in zip(found["samples"]["choose"], DOCUMENTS, strict=True):
        want = [naive_log_prob(model, document["question"], f" {choice}") for choice in document["choices"]]
        got = [response[0] for response in sample["resps"]]
        np.testing.assert_allclose([float(log_prob) for log_prob, _ in got], [p for p, _ in want], rtol=1e-5)
        right += int(np.argmax([p for p, _ in want])) == document["answer"]
    assert found["results"]["choose"]["acc,none"] == right / 3
    nats = -sum(naive_log_prob(model, "", document["question"])[0] for document in DOCUMENTS)
    size = sum(len(document["question"]) for document in DOCUMENTS)
    np.testing.assert_allclose(found["results"]["roll"]["bits_per_byte,none"], nats / size / math.log(2), rtol=1e-5)
    for sample, document in zip(found["samples"]["say"], DOCUMENTS, strict=True):
        want = model.generate(document["question"], max_tokens=5, temperature=0.0).split("e")[0]
        assert sample["resps"][0][0] == want


def test_long_texts_are_read_in_windows_and_greedy_is_said(run):
    """A window has 8 tokens: here the first predicts as many, the second the 6 that are left, from 3 before them."""
    model = moejax.load(run)
    harness = Harness(model, batch_size=2, max_length=8)
    first, second = harness._judged([([END], list(b"drop non")), (list(b"non"), list(b"e here"))])
    (whole,) = harness.loglikelihood_rolling([type("Request", (), {"args": ("drop none here",)})])
    np.testing.assert_allclose(whole, first[0] + second[0], rtol=1e-6)
    np.testing.assert_allclose(first[0], naive_log_prob(model, "", "drop non")[0], rtol=1e-5)
    scores = model.logits(np.array([[*b"route"]]))[0, -1]
    likeliest, other = int(scores.argmax()), int(scores.argmin())
    assert [greedy for _, greedy in harness._judged([([*b"route"], [likeliest]), ([*b"route"], [other])])] == [
        True,
        False,
    ]
    cut, same = harness._judged([(list(b"far too long route"), [likeliest]), (list(b"ng route"), [likeliest])])
    assert cut == same  # 8 tokens are read
