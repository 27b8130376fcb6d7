"""`moejax report RUN [RUN ...] [--out FILE]`: one HTML page on a run, or one that compares several."""

from collections.abc import Sequence

from moejax.commands.parser import Parser


def report_command(words: Sequence[str]) -> int:
    """Writes the page, and says where it is. Returns the exit code."""
    parser = Parser("report", "Writes one HTML page on a run, also while it runs, or one that compares several.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders")
    parser.add_argument(
        "--out", metavar="FILE", help="page that is written; None: RUN/report.html, of several report.html"
    )
    options = parser.parse_args(list(words))
    from moejax.report.page import write_report

    path = write_report(options.runs, options.out)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return 0
