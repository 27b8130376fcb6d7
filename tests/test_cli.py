import dataclasses
import errno
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moejax import cli
from moejax.config import ConfigError, DataConfig, MeshConfig, Phase, RunConfig, YarnConfig
from moejax.config_source import load_config, override
from moejax.serve.generate import Speed
from moejax.train.guard import DamagedError, MachineFaultError, NonFiniteError, SpikeError

CONFIGS = Path(__file__).parents[1] / "configs"
BASE = RunConfig(steps=3, data=DataConfig(train=("a.txt",)))


@pytest.fixture
def trained(monkeypatch):
    """The configs that `moejax train` hands to the loop; what the fixture's `error` holds is raised by it."""
    seen = SimpleNamespace(configs=[], error=None)

    def train(config, began):
        seen.configs.append(config)
        if seen.error:
            raise seen.error

    monkeypatch.setitem(sys.modules, "moejax.train.loop", SimpleNamespace(train=train))
    return seen


# ------------------------------------------------------------------------------------------------------- overriding


@pytest.mark.parametrize(
    ("flags", "place", "value"),
    [
        ("--optimizer.peak-lr 3e-4", "optimizer.peak_lr", 3e-4),
        ("--optimizer.peak_lr=3e-4", "optimizer.peak_lr", 3e-4),
        ("--data.train a.txt b/*.py", "data.train", ("a.txt", "b/*.py")),
        ("--data.train a b --data.weights 1 2.5", "data.weights", (1.0, 2.5)),
        ("--out x", "out", "x"),
        ("--log.tensorboard False", "log.tensorboard", False),
        ("--model.attention.q-lora-rank None", "model.attention.q_lora_rank", None),
        ("--precision fp32", "precision", "fp32"),
        ("--model.attention.yarn.factor 4", "model.attention.yarn", YarnConfig(factor=4.0)),
    ],
)
def test_flag_sets_its_field(flags, place, value):
    config = override(BASE, flags.split())
    for name in place.split("."):
        config = getattr(config, name)
    assert config == value


def test_flag_sets_one_phase_of_a_schedule():
    phases = override(BASE, ["--schedule.mtp-weight.0.value", "0.5"]).schedule.mtp_weight
    assert phases == (Phase(until=10 / 14.8, value=0.5), Phase(until=1.0, value=0.1))


def test_flags_leave_other_fields_alone():
    assert override(BASE, ["--steps", "7"]) == dataclasses.replace(BASE, steps=7)


def test_help_shows_every_field_with_doc_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run("train", CONFIGS / "tiny.py", "--help") == 0
    shown = capsys.readouterr().out
    names = {name.replace("_", "-") for name in fields_of(load_config(CONFIGS / "tiny.py"))}
    assert {name for name in names if f"--{name} " not in shown} == set()
    assert "newest checkpoints that are kept (default: 3)" in shown
    assert "--model.attention.yarn.factor" in shown


def fields_of(part, place=""):
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        items = [("", value)] if dataclasses.is_dataclass(value) else []
        if isinstance(value, tuple):
            items = [(f".{index}", item) for index, item in enumerate(value) if dataclasses.is_dataclass(item)]
        for suffix, item in items:
            yield from fields_of(item, f"{place}{field.name}{suffix}.")
        if not items and field.name != "yarn":
            yield place + field.name


# ----------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.py")))
def test_config_of_the_repository_survives_json(name, tmp_path):
    config = load_config(CONFIGS / f"{name}.py")
    (tmp_path / "config.json").write_text(config.to_json())
    assert load_config(tmp_path) == load_config(tmp_path / "config.json") == config


def run(*words):
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as end:  # --help
        return end.code or 0


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (
            "--optimizer.peak-lrr 1",
            "--optimizer.peak-lrr': wanted a field of the config; the nearest is --optimizer.peak",
        ),
        ("--num-experts 8", "--num-experts': wanted a field of the config; the nearest is --model.moe.num-experts"),
        ("stray", "command line='stray': wanted a field of the config"),
        ("--steps 3 --optimizer.peak-lr abc", "optimizer.peak_lr='abc': wanted a number"),
        ("--seed 1.5", "seed='1.5': wanted a whole number"),
        ("--steps abc", "steps='abc': wanted a whole number or None"),
        ("--log.tensorboard maybe", "log.tensorboard='maybe': wanted True or False"),
        ("--data.weights a b", "data.weights='a b': wanted a number (several, separated by spaces)"),
        ("--model.moe.gate top", "model.moe.gate='top': wanted one of noaux_tc, group_limited_greedy, greedy"),
        ("--steps", "steps='': wanted a whole number or None"),
        ("--model.moe.num-experts 10", "model.moe.num_experts=10: wanted a multiple of num_groups=4"),
        ("--model.moe.top-k 9", "model.moe.top_k=9: wanted at most the 8 experts of top_groups=2 of num_groups=4"),
        ("--mesh.expert-nodes 4 --mesh.expert 8 --seed x", "seed='x': wanted a whole number"),  # 4 fits 8, not 1
        ("--data.valid-fraction 2", "data.valid_fraction=2.0: wanted 0 or more, below 1"),
    ],
)
def test_bad_flag_is_one_line(flags, line, capsys, trained):
    assert run("train", CONFIGS / "tiny.py", *flags.split()) == 2
    assert_one_line(capsys, line)
    assert not trained.configs


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("c.py", None, "c.py': wanted a Python file with a function config(), a config.json, or a run folder"),
        ("c.py", "x = 1\ny = x / 0\n", "c.py:2='ZeroDivisionError: division by zero': wanted a config file that runs"),
        ("c.py", "def config():\n    return open('no')\n", 'c.py:2="FileNotFoundError: '),
        ("c.py", "def config(:\n", "c.py:1='SyntaxError: "),
        ("c.py", "import nowhere\n", 'c.py:1="ModuleNotFoundError: '),
        ("c.py", "steps = 3\n", "c.py': wanted a file that defines a function config() -> RunConfig"),
        ("c.py", "\ndef config():\n    return 3\n", "c.py:2 config()='int': wanted a RunConfig as its result"),
        (
            "c.py",
            "from moejax import RunConfig as R\ndef config(): return R()\n",
            "steps=None: wanted a number",
        ),
        ("c.json", '{"steps": 3,\n "seed"}', "c.json='line 2': wanted JSON"),
        ("c.json", '{"steps": 3, "sede": 1}', "sede=1: wanted one of the fields name, out, steps"),
        ("c.json", '{"steps": "3"}', "steps='3': wanted a whole number"),
        ("c.json", b"\xff\xfe", "c.json': wanted a Python file"),
    ],
)
def test_bad_config_file_is_one_line(name, text, line, tmp_path, capsys, trained):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert run("train", tmp_path / name) == 2
    assert_one_line(capsys, line)


def assert_one_line(capsys, part):
    err = capsys.readouterr().err
    assert err.startswith("moejax: ") and err.count("\n") == 1 and part in err, err


def test_config_file_may_use_its_own_constants_and_functions(tmp_path):
    lines = "from moejax import RunConfig", "N = 4", "def n(): return N", "def config(): return RunConfig(steps=n())"
    (tmp_path / "c.py").write_text("\n".join(lines))
    assert load_config(tmp_path / "c.py").steps == 4


# ---------------------------------------------------------------------------------------------- commands, exit codes


def test_train_hands_the_overridden_config_to_the_loop(trained):
    assert run("train", CONFIGS / "tiny.py", "--steps", "5", "--out", "x") == 0
    assert trained.configs == [load_config(CONFIGS / "tiny.py", ["--steps=5", "--out=x"])]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("data.train[0]", "no.txt", "a file"), 2),
        (RuntimeError("Unable to initialize backend 'cuda': no devices\nmore"), 3),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (NonFiniteError("loss at step 3"), 10),
        (DamagedError("no checkpoint is whole"), 12),
        (MachineFaultError("finite when repeated"), 13),
        (SpikeError("loss 100"), 14),
        (KeyboardInterrupt(), 130),
    ],
    ids=["user", "hardware", "full disk", "non-finite", "damaged", "machine fault", "spike", "interrupt"],
)
def test_exit_code(error, code, capsys, trained):
    trained.error = error
    assert run("train", CONFIGS / "tiny.py") == code
    assert_one_line(capsys, "")


def test_bug_keeps_its_traceback(trained):
    trained.error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        run("train", CONFIGS / "tiny.py")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], "COMMAND='trian': wanted one of train, show, generate, checkpoints, train-tokenizer"),
        (["train"], "CONFIG='': wanted a config first"),
        (["train", "--steps", "3"], "CONFIG='--steps': wanted a config first"),
        (["generate"], "the following arguments are required: RUN"),
        (["generate", "run", "--top-p", "x"], "argument --top-p: invalid float value: 'x'"),
        (["generate", "run", "--topp", "1"], "unrecognized arguments: --topp 1"),
        (["generate", "run", "--compare"], "--compare without --speculative"),
        (["generate", "run", "--mesh.expert", "x"], "mesh.expert='x': wanted a whole number"),
        (["train-tokenizer", "no/such/file", "--out", "unused.json"], "no/such/file"),
    ],
)
def test_bad_command_is_one_line(words, line, capsys):
    assert run(*words) == 2
    assert_one_line(capsys, line)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["generate", "-h"], ["train-tokenizer", "-h"]])
def test_help_goes_to_stdout(words, capsys):
    assert run(*words) == 0
    shown = capsys.readouterr()
    assert "moejax" in shown.out and not shown.err


def test_train_tokenizer_writes_the_file(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 50)
    assert run("train-tokenizer", tmp_path / "text.txt", "--vocab-size", 300, "--out", tmp_path / "t.json") == 0
    assert "model" in json.loads((tmp_path / "t.json").read_text())
    assert "tokens" in capsys.readouterr().out


class Echo:
    """A model that says its prompts again, letter by letter."""

    def __init__(self):
        self.asked = []

    def answering(self, prompts, **options):
        self.asked.append(options)
        answers = SimpleNamespace(texts=prompts, ids=[[1]] * len(prompts), ended=["stop"] * len(prompts))
        answers.speed = Speed(tokens=4, seconds=2.0, steps=2, drafted=4 * options["speculative"], accepted=3)
        return EchoStream(prompts, answers)

    def answer(self, prompts, **options):
        return self.answering(prompts, **options).answers


@dataclasses.dataclass
class EchoStream:
    prompts: list
    answers: SimpleNamespace

    def __iter__(self):
        return ((i, letter) for i, prompt in enumerate(self.prompts) for letter in prompt)


@pytest.fixture
def echo(monkeypatch):
    model = Echo()
    loaded = SimpleNamespace(load=lambda folder, mesh: setattr(model, "loaded", (folder, mesh)) or model)
    monkeypatch.setitem(sys.modules, "moejax.serve.load", loaded)
    return model


def test_generate_prints_what_the_model_says(echo, capsys):
    assert run("generate", "run", "--prompt", "go", "--max-tokens", 7, "--seed", 3, "--stop", "x", "yz") == 0
    shown = capsys.readouterr()
    assert shown.out == "gogo\n" and shown.err.startswith("4 tokens in 2.00 s: 2.0 tokens/s")
    assert echo.loaded == ("run", None)
    assert echo.asked[0] | {"max_tokens": 7, "seed": 3, "stop": ["x", "yz"]} == echo.asked[0]


def test_generate_answers_several_prompts_on_a_mesh(echo, capsys):
    assert run("generate", "run", "--prompt", "a", "b", "--seed", 3, 5, "--mesh.expert", 4, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [one["text"] for one in shown["answers"]] == ["a", "b"] and shown["speed"]["plain"]["tokens_per_second"] == 2
    assert echo.asked[0]["seed"] == [3, 5]
    assert echo.loaded[1] == MeshConfig(data=-1, expert=4)
    assert run("generate", "run", "--prompt", "a", "b") == 0
    assert capsys.readouterr().out == "aa\nbb\n"


def test_generate_with_drafts_says_what_they_bring(echo, capsys):
    assert run("generate", "run", "--prompt", "go", "--speculative", "--compare") == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("speculative: 4 tokens") and "75% of 4 drafts accepted" in first
    assert second.startswith("plain: 4 tokens") and "drafts" not in second
    assert [asked["speculative"] for asked in echo.asked] == [True, False]


# ----------------------------------------------------------------------------------------------------- public surface


def test_import_does_not_load_jax():
    code = "import sys, moejax, moejax.cli; print(*[n for n in ('jax', 'flax', 'matplotlib') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_train_stays_the_function_after_its_package_is_loaded():
    import moejax
    import moejax.train.runlog

    assert callable(moejax.train)


def test_module_command_gives_one_line_and_code_2():
    command = [sys.executable, "-m", "moejax", "train", "no_such_config.py"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
