"""Documents out of files: plain text, JSONL and Parquet, named by file, folder or glob.

A document is one text file, one line of a JSONL file (.jsonl, .ndjson) or one row of a Parquet file (.parquet). Text
is UTF-8; bytes of a text file that are not become U+FFFD. Everything is read as a stream, in the order of the sorted
paths; a long text file comes in parts.
"""

import glob
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moejax.config import ConfigError, DataConfig

PART_CHARACTERS = 1 << 20  # of a text file that are read at a time
SNIFFED_BYTES = 8000  # a NUL among these marks a file as binary, the rule of git
JSONL = (".jsonl", ".ndjson")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One entry of `data.train` or `data.valid`, and the files it stands for."""

    place: str  # `data.train[0]`
    entry: str  # as the user wrote it
    files: tuple[Path, ...]  # sorted
    config: DataConfig

    def error(self, wanted: str) -> ConfigError:
        """The error that names this entry."""
        return ConfigError(self.place, self.entry, wanted)


def find_sources(config: DataConfig, name: str, entries: Iterable[str] | None = None) -> list[Source]:
    """One source for each entry of `data.<name>`, or of `entries` in its stead.

    An entry is a file, a folder (with all folders below it) or a glob, where `**` stands for any folders. Folders and
    globs leave out hidden files, binary files and what `data.exclude` names.

    Raises:
        ConfigError: an entry stands for no file, or for a file that is binary or cannot be read.
    """
    entries = getattr(config, name) if entries is None else entries
    return [_find_source(entry, f"data.{name}[{index}]", config) for index, entry in enumerate(entries)]


def _find_source(entry: str, place: str, config: DataConfig) -> Source:
    path = Path(entry).expanduser()
    try:
        if path.is_file():
            if _is_binary(path):
                raise ConfigError(place, entry, "text, JSONL or Parquet, and this file has NUL bytes")
            return Source(place=place, entry=entry, files=(path,), config=config)
        if path.is_dir():
            named = _walk(path, config.exclude)
        elif glob.has_magic(entry):
            named = _match(path, config.exclude)
        else:
            raise ConfigError(place, entry, "a file, a folder or a glob that exists")
        files = tuple(sorted(found for found in set(named) if found.is_file() and not _is_binary(found)))
    except OSError as error:
        raise ConfigError(place, entry, f"files that can be read ({error.filename}: {error.strerror})") from None
    if not files:
        left_out = f", apart from data.exclude={config.exclude!r}" if config.exclude else ""
        raise ConfigError(place, entry, f"at least one text, JSONL or Parquet file there{left_out}")
    return Source(place=place, entry=entry, files=files, config=config)


def _walk(folder: Path, exclude: Sequence[str]) -> Iterator[Path]:
    """The files below a folder."""

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in exclude]
        yield from (Path(parent, name) for name in names if not name.startswith(".") and name not in exclude)


def _match(pattern: Path, exclude: Sequence[str]) -> Iterator[Path]:
    """What a glob matches. `exclude` holds for names from its first wildcard on."""
    fixed = next(index for index, part in enumerate(pattern.parts) if glob.has_magic(part))
    for found in glob.iglob(str(pattern), recursive=True):
        if not set(Path(found).parts[fixed:]) & set(exclude):
            yield Path(found)


def _is_binary(path: Path) -> bool:
    if path.suffix in (*JSONL, ".parquet"):
        return False
    with path.open("rb") as file:
        return b"\0" in file.read(SNIFFED_BYTES)


def read_documents(source: Source) -> Iterator[tuple[str, bool]]:
    """The documents of a source, none of them empty, as pairs (text, whether the document ends with it).

    A long text file comes as several pairs. With `data.bad_line` "skip", JSONL lines that cannot be read are left out
    and counted in one warning of the log.

    Raises:
        ConfigError: a file cannot be read, a line is bad and `data.bad_line` is "error", or there is no text at all.
    """
    bad_lines = _BadLines(source)
    any_text = False
    for path in source.files:
        try:
            if path.suffix in JSONL:
                documents = _read_jsonl(path, source, bad_lines)
            elif path.suffix == ".parquet":
                documents = _read_parquet(path, source)
            else:
                documents = _read_text(path)
            for text, ends in documents:
                any_text |= bool(text)
                if text:
                    yield text, ends
        except OSError as error:
            raise source.error(f"files that can be read ({path}: {error.strerror or error})") from None
    bad_lines.report()
    if not any_text:
        raise source.error("at least one document that is not empty")


def _read_text(path: Path) -> Iterator[tuple[str, bool]]:
    """The file in parts of about PART_CHARACTERS that end after a line where there is one."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        part = file.read(PART_CHARACTERS)
        while part:
            following = file.read(PART_CHARACTERS)
            if following:
                end = part.rfind("\n") + 1 or len(part)
                part, following = part[:end], part[end:] + following
            yield part, not following
            part = following


@dataclass
class _BadLines:
    """JSONL lines that cannot be read: an error at the first, or a count of those left out."""

    source: Source
    count: int = 0
    first: str = ""

    def add(self, path: Path, number: int, problem: object) -> None:
        line = f"{path} line {number}: {problem}"
        if self.source.config.bad_line == "error":
            wanted = f'a JSON object with text under "{self.source.config.text_field}" in every line'
            raise self.source.error(f"{wanted} ({line}); data.bad_line=skip leaves such lines out") from None
        self.count += 1
        self.first = self.first or line

    def report(self) -> None:
        if self.count:
            _logger.warning("%s: lines left out: %d, the first is %s", self.source.place, self.count, self.first)


def _read_jsonl(path: Path, source: Source, bad_lines: _BadLines) -> Iterator[tuple[str, bool]]:
    field = source.config.text_field
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                row = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                bad_lines.add(path, number, f"{error.msg} at column {error.colno}")
                continue
            except (ValueError, RecursionError) as error:  # bad UTF-8, endless digits, deep nesting
                bad_lines.add(path, number, error)
                continue
            if not isinstance(row, dict) or field not in row:
                bad_lines.add(path, number, f'no "{field}"')
            elif not isinstance(row[field], str | None):
                bad_lines.add(path, number, f'"{field}" is not text')
            else:
                # JSON can name halves of surrogate pairs, which no UTF-8 has
                yield (row[field] or "").encode("utf-8", "replace").decode(), True


def _read_parquet(path: Path, source: Source) -> Iterator[tuple[str, bool]]:
    import pyarrow  # takes a while to import, and few runs need it
    import pyarrow.parquet

    field = source.config.text_field
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                wanted = f"Parquet files with the column of data.text_field={field!r} ({path} has {', '.join(names)})"
                raise source.error(wanted)
            kind = file.schema_arrow.field(field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise source.error(f"text in the column {field!r} of data.text_field ({path} has {kind})")
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                yield from ((text or "", True) for text in batch.column(0).to_pylist())
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise source.error(f"whole Parquet files ({path}: {str(error).splitlines()[0]})") from None
