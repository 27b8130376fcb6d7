"""`moejax import-hf` and `moejax export-hf`: weights in and out, in the layout of Hugging Face."""

from collections.abc import Sequence
from pathlib import Path

from moejax.commands.parser import Parser

DTYPES = ("bf16", "fp8", "fp32")


def import_command(words: Sequence[str]) -> int:
    """Writes a run folder from a Hugging Face folder. Returns the exit code."""
    parser = Parser("import-hf", "Makes a run folder of a DeepSeek-V3, V2 or V2-Lite model in Hugging Face's layout.")
    parser.add_argument("dir", metavar="DIR", help="folder with config.json and .safetensors files, FP8 or not")
    parser.add_argument("out", metavar="OUT", help="run folder that is made; train --resume-from and others take it")
    options = parser.parse_args(list(words))
    from moejax.serve.import_hf import import_hf

    done = import_hf(Path(options.dir), Path(options.out))
    print(f"{options.out}: {done.tensors} tensors of {options.dir}, {done.bytes / 1e6:,.1f} MB of weights in FP32")
    return 0


def export_command(words: Sequence[str]) -> int:
    """Writes a Hugging Face folder from a run. Returns the exit code."""
    parser = Parser("export-hf", "Writes the model of a run in Hugging Face's layout.")
    parser.add_argument("run", metavar="RUN", help="run folder, or one of its checkpoints/<step>")
    parser.add_argument("dir", metavar="DIR", help="folder that is made")
    parser.add_argument("--step", type=int, help="of the checkpoint; None: the newest")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights; fp8: as published")
    parser.add_argument("--ema", action="store_true", help="the averaged weights (optimizer.ema_decay)")
    parser.add_argument("--shard-size", type=float, default=5.0, metavar="GB", help="of a file at most")
    options = parser.parse_args(list(words))
    from moejax.checkpoint.listing import folders

    run = Path(options.run)
    is_checkpoint = options.step is None and run.name.isdigit() and (run / "meta").is_dir()
    checkpoint = run if is_checkpoint else folders(run, options.step)[-1]
    print(exported(checkpoint, options.dir, options.dtype, options.ema, options.shard_size))
    return 0


def exported(checkpoint: Path, to: str, dtype: str, ema: bool, shard_gigabytes: float) -> str:
    """Exports a checkpoint, and says what was written."""
    from moejax.serve.export import export

    done = export(checkpoint, Path(to), dtype=dtype, ema=ema, shard_bytes=shard_gigabytes * 1e9)  # type: ignore[arg-type]
    return f"{to}: {done.tensors} tensors of {checkpoint} in {done.files} files, {done.bytes / 1e6:,.1f} MB"
