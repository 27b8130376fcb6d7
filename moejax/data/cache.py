"""Text tokenised once: a folder of flat files for each source, from which every later run reads.

    <cache>/<key>/tokens.bin    uint16 or uint32, all documents one after the other, each ending with the end token
                  offsets.npy   int64 [documents + 1], where each document starts in tokens.bin
                  hashes.npy    uint64 [documents], of the text of each document
                  meta.json     written last: sizes, and what the tokens were made from

The key is a hash of the tokenizer and of the paths, sizes and times of the files. A folder is written beside its place
under another name and then renamed, so that one that exists is whole.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moejax.config import ConfigError
from moejax.data.sources import Source, read_documents
from moejax.data.tokens import Tokenizer

FORMAT = 1  # part of the key
BATCH_CHARACTERS = 1 << 21  # that are tokenised at a time
PROGRESS_SECONDS = 10.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TokenFile:
    """The tokens of one source, mapped from its folder."""

    tokens: np.ndarray  # uint16 or uint32 [tokens]
    offsets: np.ndarray  # int64 [documents + 1]
    hashes: np.ndarray  # uint64 [documents]


def open_tokens(source: Source, tokenizer: Tokenizer, cache: str | Path) -> TokenFile:
    """The tokens of a source, out of the folder `cache` if they are there, else tokenised into it.

    Raises:
        ConfigError: the files cannot be read as text, or the cache cannot be written (a full disk).
    """
    cache = Path(cache).expanduser()
    key = _key(source, tokenizer)
    if not _is_whole(cache / key):
        try:
            _make(source, tokenizer, cache, key)
        except OSError as error:
            if not _is_whole(cache / key):  # it is if another process was first
                wanted = f"a folder with room for the tokens of {source.place} ({error.strerror})"
                raise ConfigError("data.cache", str(cache), wanted) from None
    return _load(cache / key)


def _key(source: Source, tokenizer: Tokenizer) -> str:
    try:
        stats = [(os.path.abspath(path), path.stat()) for path in source.files]
    except OSError as error:
        raise source.error(f"files that can be read ({error.filename}: {error.strerror})") from None
    files = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    made_from = [FORMAT, tokenizer.fingerprint, files, source.config.text_field, source.config.bad_line]
    return hashlib.blake2b(json.dumps(made_from).encode(), digest_size=12).hexdigest()


def _is_whole(folder: Path) -> bool:
    """Whether the token files are there with the sizes that meta.json names."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return all((folder / name).stat().st_size == size for name, size in meta["bytes"].items())
    except (OSError, ValueError):
        return False


def _load(folder: Path) -> TokenFile:
    meta = json.loads((folder / "meta.json").read_text())
    # a plain view: slices of a np.memmap cost several times more
    tokens = np.memmap(folder / "tokens.bin", meta["dtype"], mode="r").view(np.ndarray)
    offsets, hashes = (np.load(folder / name, mmap_mode="r").view(np.ndarray) for name in ("offsets.npy", "hashes.npy"))
    return TokenFile(tokens, offsets, hashes)


def _make(source: Source, tokenizer: Tokenizer, cache: Path, key: str) -> None:
    """Writes the folder of a source under another name and renames it into its place."""
    temporary = cache / f".{key}.{secrets.token_hex(4)}"
    temporary.mkdir(parents=True)
    try:
        _write(source, tokenizer, temporary)
        if (cache / key).exists() and not _is_whole(cache / key):
            shutil.rmtree(cache / key)
        temporary.rename(cache / key)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    end = np.array([tokenizer.end_id], dtype).tobytes()
    offsets, hashes, num_tokens = array("q", [0]), array("Q"), 0
    text_hash = hashlib.blake2b(digest_size=8)
    start = reported = time.monotonic()
    with (folder / "tokens.bin").open("wb") as file:
        for batch in _batches(read_documents(source)):
            for (text, ends), ids in zip(batch, tokenizer.encode_batch([text for text, _ in batch]), strict=True):
                file.write(ids.astype(dtype).tobytes())
                num_tokens += len(ids)
                text_hash.update(text.encode())
                if ends:
                    file.write(end)
                    num_tokens += 1
                    offsets.append(num_tokens)
                    hashes.append(int.from_bytes(text_hash.digest(), "little"))
                    text_hash = hashlib.blake2b(digest_size=8)
            if time.monotonic() - reported > PROGRESS_SECONDS:
                reported = time.monotonic()
                rate = num_tokens / (reported - start)
                _logger.info("%s: %d tokens so far, %.0f tokens/s", source.place, num_tokens, rate)
    np.save(folder / "offsets.npy", np.array(offsets, np.int64))
    np.save(folder / "hashes.npy", np.array(hashes, np.uint64))
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    meta = {"dtype": dtype.name, "bytes": sizes, "source": source.entry, "tokenizer": tokenizer.fingerprint}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    files, documents = len(source.files), len(hashes)
    _logger.info("%s: %d tokens in %d documents of %d files", source.place, num_tokens, documents, files)


def _batches(documents: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Documents in lists of about BATCH_CHARACTERS."""
    batch: list[tuple[str, bool]] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document[0])
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
