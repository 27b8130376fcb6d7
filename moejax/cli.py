"""The command line: `moejax COMMAND ...`, also `python -m moejax COMMAND ...`.

    moejax train CONFIG [--any.field value ...]      train; CONFIG is a Python file, a config.json or a run folder
    moejax show CONFIG [--any.field value ...]       the arrays of the training state and the stages of a pipeline
    moejax generate RUN --prompt TEXT [...]          text from a trained model
    moejax checkpoints RUN [ACTION] [STEP] [TO]      list, verify, show, copy or export the checkpoints of a run
    moejax eval RUN DATA ...                         loss, perplexity and bits per byte; experts used, by domain
    moejax placement RUN --gpus N [--redundant N]    where experts should lie to serve a model
    moejax import-hf DIR OUT                         a run folder of a model in the layout of Hugging Face
    moejax export-hf RUN DIR [--dtype bf16|fp8|fp32] the model of a run in that layout
    moejax train-tokenizer FILES ... --out FILE      a BPE tokenizer.json from text
    moejax schedule [--kind NAME --stages N ...]     a pipeline schedule as text and picture, and what it costs
    moejax plan CONFIG [--any.field value ...]       memory, time and cost of a run, before anyone rents a GPU
    moejax report RUN [RUN ...] [--out FILE]         one HTML page on a run, or one that compares several
    moejax COMMAND --help                            all options

Whatever the user can get wrong ends as one line on stderr. Exit codes: 0 done, or stopped on request with a checkpoint;
1 a bug; 2 the user's input; 3 hardware asked for is absent; 10 losses or gradients that are not finite; 11 a step that
hung; 12 no checkpoint of the run is whole; 13 steps that were finite only when repeated; 14 a spike of the loss.
"""

import argparse
import errno
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import psutil
from rich.console import Console

from moejax.commands.evaluate import eval_command
from moejax.commands.generate import generate_command
from moejax.commands.parser import Parser
from moejax.commands.placement import placement_command
from moejax.commands.plan import plan_command
from moejax.commands.report import report_command
from moejax.commands.schedule import schedule_command
from moejax.commands.weights import DTYPES, export_command, exported, import_command
from moejax.config import ConfigError, DataConfig, RunConfig
from moejax.config_source import USAGE, load_config, override
from moejax.launch.join import is_joined, join, leave
from moejax.launch.local import is_launcher, run_processes

DONE, BUG, USER, HARDWARE, DAMAGED, INTERRUPTED = 0, 1, 2, 3, 12, 130  # 10, 13, 14: guard.py; 11: watchdog.py


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. `arguments`: those of the process when None."""
    try:
        code = _answer(list(sys.argv[1:] if arguments is None else arguments))
    except Exception:
        if not is_joined():
            raise
        traceback.print_exc()
        code = BUG
    if code != DONE:
        leave(code)
    return code


def _answer(words: list[str]) -> int:
    try:
        return _run(words)
    except ConfigError as error:
        return _fail(str(error), USER)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _fail(f"{error.filename or 'a file of the run'}: wanted a disk with space left", USER)
    except RuntimeError as error:
        if "Unable to initialize backend" not in str(error):  # what JAX says of JAX_PLATFORMS=cuda without a GPU
            raise
        return _fail(str(error), HARDWARE)


def _run(words: list[str]) -> int:
    commands = {
        "train": _train,
        "show": _show,
        "generate": generate_command,
        "checkpoints": _checkpoints,
        "train-tokenizer": _train_tokenizer,
        "schedule": schedule_command,
        "plan": plan_command,
        "report": report_command,
        "import-hf": import_command,
        "export-hf": export_command,
        "eval": eval_command,
        "placement": placement_command,
    }
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return DONE if words else USER
    if words[0] not in commands:
        raise ConfigError("COMMAND", words[0], f"one of {', '.join(commands)}")
    return commands[words[0]](words[1:])


def _fail(reason: str, code: int) -> int:
    print("moejax:", " ".join(reason.split()), file=sys.stderr)
    return code


# ----------------------------------------------------------------------------------------------------------- commands


def _train(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        if words and words[0] in ("-h", "--help"):
            override(RunConfig(steps=1), ["--help"])
        raise ConfigError("CONFIG", words[0] if words else "", f"a config first: {USAGE} [--any.field value ...]")
    config = load_config(words[0], words[1:])
    if is_launcher(config):
        return run_processes([sys.executable, "-m", "moejax", "train", *words], config)
    config = join(config)
    from moejax.train.guard import EndError
    from moejax.train.loop import train

    try:
        train(config, began=psutil.Process().create_time())
    except EndError as error:
        return _fail(str(error), error.exit_code)
    return DONE


def _show(words: list[str]) -> int:
    as_lines = [word for word in words if word != "--json"]
    if not as_lines or as_lines[0].startswith("-"):
        raise ConfigError("CONFIG", as_lines[0] if as_lines else "", "a config first: moejax show CONFIG [--json]")
    config = load_config(as_lines[0], as_lines[1:])
    from moejax.plan.arrays import as_json, as_stage_table, as_table, stage_rows, state_arrays

    stages, rows = stage_rows(config, config.simulate), state_arrays(config, config.simulate)
    if "--json" in words:
        print(json.dumps(as_json(rows, stages), indent=2))
        return DONE
    console = Console(width=150)
    if stages:
        console.print(as_stage_table(stages), "")
    console.print(as_table(rows))
    return DONE


def _checkpoints(words: list[str]) -> int:
    parser = Parser("checkpoints", "Lists, verifies, shows, copies or exports the checkpoints of a run.")
    parser.add_argument("run", metavar="RUN", help="run folder; for list and copy also an address with copies")
    actions = {
        "list": "all",
        "verify": "compare files with their checksums",
        "show": "the arrays of one",
        "copy": "one to the folder TO, or to TO/STEP at an address, as checkpoint.remote has it",
        "export": "the model of one to the folder TO in the layout of Hugging Face",
    }
    help_of_actions = "; ".join(f"{name}: {does}" for name, does in actions.items())
    parser.add_argument("action", metavar="ACTION", nargs="?", default="list", choices=actions, help=help_of_actions)
    parser.add_argument("step", metavar="STEP", nargs="?", type=int, help="its step; None: the newest, and verify all")
    parser.add_argument("to", metavar="TO", nargs="?", help="folder that is made; an address, as s3://bucket/run")
    parser.add_argument("--json", action="store_true", help="list and show as JSON")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights of an export")
    parser.add_argument("--ema", action="store_true", help="export the averaged weights (optimizer.ema_decay)")
    parser.add_argument("--shard-size", type=float, default=5.0, metavar="GB", help="of an export's files at most")
    options = parser.parse_args(words)
    from moejax.checkpoint import listing
    from moejax.checkpoint.copying import is_address
    from moejax.checkpoint.stored import arrays

    if is_address(options.run):
        return _copies(options)
    if options.action == "list":
        found = listing.entries(options.run)
        _print_rows(listing.as_json(found) if options.json else listing.as_table(found))
        return DONE
    folders = listing.folders(options.run, options.step)
    if options.action == "verify":
        reports = [listing.report(folder) for folder in folders]
        print("\n".join(line for lines, _ in reports for line in lines))
        return DONE if all(whole for _, whole in reports) else DAMAGED
    if options.action == "show":
        rows = arrays(folders[-1])
        _print_rows(listing.as_json(rows) if options.json else listing.as_array_table(rows))
    elif options.to is None:
        raise ConfigError("TO", None, f"a place for it: moejax checkpoints RUN {options.action} STEP TO")
    else:
        print(
            _copied(folders[-1], options)
            if options.action == "copy"
            else exported(folders[-1], options.to, options.dtype, options.ema, options.shard_size)
        )
    return DONE


def _copied(folder: Path, options: argparse.Namespace) -> str:
    from moejax.checkpoint.copying import copy, is_address, send

    if not is_address(options.to):
        return f"{options.to}: {copy(folder, Path(options.to))} files, equal to {folder}"
    return f"{options.to}/{folder.name}: {send(folder, options.to)} files sent, now equal to {folder}"


def _copies(options: argparse.Namespace) -> int:
    """`moejax checkpoints ADDRESS ...`."""
    from moejax.checkpoint import copying, listing

    if options.action == "list":
        found = copying.copies(options.run)
        _print_rows(listing.as_json(found) if options.json else listing.as_copy_table(found))
    elif options.action != "copy":
        raise ConfigError("ACTION", options.action, "list or copy, as RUN is an address: copy it to a folder first")
    elif options.to is None or copying.is_address(options.to):
        raise ConfigError("TO", options.to, "a folder: moejax checkpoints ADDRESS copy STEP TO")
    else:
        step, files = copying.fetch(options.run, options.step, Path(options.to))
        print(f"{options.to}: {files} files, equal to {options.run}/{step}")
    return DONE


def _print_rows(rows: object) -> None:
    if isinstance(rows, list):
        print(json.dumps(rows, indent=2))
    else:
        Console(width=150).print(rows)


def _train_tokenizer(words: list[str]) -> int:
    parser = Parser("train-tokenizer", "Trains a byte-level BPE tokenizer on text and writes its tokenizer.json.")
    parser.add_argument("files", metavar="FILES", nargs="+", help="files, folders or globs, as in data.train")
    parser.add_argument("--vocab-size", type=int, default=32768, help="tokens, special ones included")
    parser.add_argument("--out", default="tokenizer.json", help="file that is written")
    parser.add_argument("--text-field", default=DataConfig.text_field, help="as data.text_field")
    parser.add_argument("--bad-line", choices=("error", "skip"), default=DataConfig.bad_line, help="as data.bad_line")
    options = parser.parse_args(words)
    from moejax.data.tokens import train_tokenizer

    reading = DataConfig(text_field=options.text_field, bad_line=options.bad_line)
    tokens = train_tokenizer(options.files, options.vocab_size, options.out, reading)
    print(f"{options.out}: {tokens} tokens")
    return DONE
