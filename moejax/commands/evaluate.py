"""`moejax eval RUN DATA...`: loss, perplexity and bits per byte on text, and the experts that each domain uses."""

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from rich.console import Console
from rich.table import Table

from moejax.commands.parser import Parser
from moejax.config import Precision

if TYPE_CHECKING:
    from moejax.serve.evaluate import Evaluation


def eval_command(words: Sequence[str]) -> int:
    """Prints how well a model predicts text. Returns the exit code."""
    parser = Parser("eval", "Loss, perplexity and bits per byte on text, and the experts that each domain uses.")
    parser.add_argument("run", metavar="RUN", help="run folder, checkpoint or Hugging Face folder")
    parser.add_argument("data", metavar="DATA", nargs="+", help="file, folder or glob; a folder's folders are domains")
    parser.add_argument(
        "--length", type=int, help="tokens that a window reads; None: the model's context, at most 4096"
    )
    parser.add_argument(
        "--stride", type=int, help="tokens by which windows move; None: the length, so none is read twice"
    )
    parser.add_argument("--rows", type=int, default=8, help="windows that are read at a time")
    parser.add_argument("--precision", choices=get_args(Precision), help="of the compute; None: the run's")
    parser.add_argument("--json", action="store_true", help="all of it as JSON, with the share of every expert")
    options = parser.parse_args(list(words))
    from moejax.serve.evaluate import evaluate

    windows = {"length": options.length, "stride": options.stride, "rows": options.rows}
    found = evaluate(options.run, options.data, **windows, precision=options.precision)
    if options.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        console = Console(width=150, highlight=False)
        console.print(_table(found))
        console.print(f"windows of {found.length} tokens that move by {found.stride}", soft_wrap=True)
    return 0


def _table(found: "Evaluation") -> Table:
    table = Table("domain")
    for heading in ("tokens", "loss", "perplexity", "bits/byte", "entropy of experts"):
        table.add_column(heading, justify="right")
    table.add_column("layer.expert: share, times that of all domains")
    for domain in found.domains:
        entropy = f"{sum(domain.entropy) / len(domain.entropy):.3f}" if domain.entropy else ""
        listed = (f"{one.layer}.{one.expert}: {one.share:.1%}, {one.times:.2f}" for one in domain.specialists[:3])
        table.add_row(domain.name, *_numbers(domain.score), entropy, "; ".join(listed))
    if len(found.domains) > 1:
        table.add_row("all", *_numbers(found.total), "", "")
    return table


def _numbers(score: object) -> tuple[str, ...]:
    tokens, loss, perplexity, bits = (getattr(score, n) for n in ("tokens", "loss", "perplexity", "bits_per_byte"))
    return f"{tokens:,}", f"{loss:.4f}", f"{perplexity:,.2f}", "" if bits is None else f"{bits:.4f}"
