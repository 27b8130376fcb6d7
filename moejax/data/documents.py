"""Documents of tokens, and which of them are for training and which for validation.

The split. A document goes to validation whole if its hash, as a fraction of 2^64, is below `data.valid_fraction`. One
that is longer than that share of all tokens (of a source, in a mix) would be the whole of validation by itself, so it
is cut instead: its end is for validation (nanoGPT's split of a single file). If that leaves one side without text,
every document is cut. Equal documents are treated alike, and no text of the one side is on the other. With
`data.valid`, training leaves out the documents that are also there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moejax.data.cache import TokenFile

PIECE_TOKENS = 16384  # longer documents are cut for shuffling
PIECE_ROWS = 4  # but not into less than this many rows
PIECES_PER_SHARD = 16  # that a small corpus is cut into


@dataclass(frozen=True, eq=False)
class Documents:
    """Stretches of the tokens of several files, in a fixed order. A random-access source for Grain."""

    files: tuple[TokenFile, ...]
    file: np.ndarray  # int64 [documents]: index into files
    start: np.ndarray  # int64 [documents]
    length: np.ndarray  # int64 [documents], above 0

    def __len__(self) -> int:
        return len(self.length)

    def __getitem__(self, index: int) -> np.ndarray:
        """The tokens of one document, uint16 or uint32, not copied."""
        start = self.start[index]
        return self.files[self.file[index]].tokens[start : start + self.length[index]]

    def __repr__(self) -> str:
        return f"Documents({len(self)} of {self.num_tokens} tokens)"

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.length.sum())

    def where(self, chosen: np.ndarray) -> "Documents":
        """The documents at which `chosen` (bool) is true."""
        return Documents(self.files, self.file[chosen], self.start[chosen], self.length[chosen])

    def cut(self, longest: int) -> "Documents":
        """The same tokens, documents of more than `longest` tokens cut into equal pieces."""
        pieces = -(-self.length // longest)
        of = np.repeat(np.arange(len(self)), pieces)
        number = np.arange(len(of)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        first, past = (self.length[of] * n // pieces[of] for n in (number, number + 1))
        return Documents(self.files, self.file[of], self.start[of] + first, past - first)

    def count_tokens(self, vocab_size: int, at_most: int = 1 << 26) -> np.ndarray:
        """How often each token occurs, int64 [vocab_size]; in every n-th document if there are more than `at_most`."""
        counts = np.zeros(vocab_size, np.int64)
        chosen = np.arange(0, len(self), -(-self.num_tokens // at_most) or 1)
        # about a million tokens at a time
        for group in np.array_split(chosen, 1 + int(self.length[chosen].sum()) // (1 << 20)):
            if len(group):
                counts += np.bincount(np.concatenate([self[index] for index in group]), minlength=vocab_size)
        return counts


def whole_files(files: Sequence[TokenFile]) -> Documents:
    """All documents of some files, in order."""
    file = np.repeat(np.arange(len(files)), [len(f.hashes) for f in files])
    start = np.concatenate([f.offsets[:-1] for f in files])
    return Documents(tuple(files), file, start, np.concatenate([np.diff(f.offsets) for f in files]))


def pieces(documents: Documents, sequence_length: int, shards: int) -> Documents:
    """The documents, long ones cut so that there is something to shuffle and to share between shards.

    A piece has at most PIECE_TOKENS tokens, or fewer where that would make less than PIECES_PER_SHARD pieces for each
    shard; but documents of up to PIECE_ROWS rows stay whole. From here on a piece is a document of its own, to be
    shuffled, masked and rearranged, except that only the last one of a document has the end token.
    """
    rows = PIECE_ROWS * (sequence_length + 1)
    return documents.cut(max(rows, min(PIECE_TOKENS, documents.num_tokens // (PIECES_PER_SHARD * shards))))


def split(
    train: Sequence[TokenFile], valid: Sequence[TokenFile], fraction: float, *, by_source: bool
) -> tuple[list[Documents], Documents]:
    """The training documents (one pool, or with `by_source` one for each file of `train`) and those for validation."""
    every, hashes = whole_files(train), np.concatenate([f.hashes for f in train])
    if valid:
        known = np.concatenate([f.hashes for f in valid])
        return _pools(every.where(~np.isin(hashes, known)), by_source), whole_files(valid)
    pool = every.file if by_source else np.zeros_like(every.file)
    limit = fraction * np.bincount(pool, every.length)
    too_long = np.isin(hashes, hashes[every.length > limit[pool]])  # anywhere, so that equal documents are alike
    chosen = hashes < np.uint64(fraction * 2.0**64)
    for cut in (too_long, np.ones_like(too_long)):
        tail = (every.length * fraction).astype(np.int64)
        held = np.where(cut, tail, np.where(chosen, every.length, 0))
        kept = every.length - held
        pools = _pools(Documents(every.files, every.file, every.start, kept).where(kept > 0), by_source)
        for_valid = Documents(every.files, every.file, every.start + kept, held).where(held > 0)
        if for_valid.num_tokens and all(pool.num_tokens for pool in pools):
            break
    return pools, for_valid


def _pools(documents: Documents, by_source: bool) -> list[Documents]:
    if not by_source:
        return [documents]
    return [documents.where(documents.file == index) for index in range(len(documents.files))]
