"""Batches out of documents: shuffle, fill in the middle, pack; the same whatever the number of hosts.

The data is read by `data.virtual_shards` fixed shards. Shard v reads documents v, v + V, v + 2V, ... of an endless
sequence in which every epoch is shuffled anew, and its packer joins them and cuts the result every T + 1 tokens: rows
share no token, and all but the first of a row are predicted once. A batch has the same number of rows of each shard, in
the order of the shards; a host owns consecutive shards. Where a shard is, is two numbers for each source: the document,
and how many of its tokens are used. (Grain's ConcatThenSplit packs alike, but its state comes back from JSON with its
empty slice as a list, and then the document there is lost; and it works row by row.)

With `data.weights` there is a packer for each source, and row r of shard v is from the source in whose part of [0, 1)
the number v / V + r * golden ratio (mod 1) falls: the shares are right in every batch and in every shard, to about a
row.
"""

import hashlib
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from moejax.config import ConfigError, DataConfig
from moejax.data.documents import Documents
from moejax.data.tokens import Tokenizer

GOLDEN_RATIO = (5**0.5 - 1) / 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of T + 1 tokens: the model reads all but the last and predicts all but the first."""

    tokens: np.ndarray  # int32 [rows, T + 1]
    segment_ids: np.ndarray  # int32 [rows, T + 1]: number of the document within the row, from 0; all 0: no masking
    loss_mask: np.ndarray  # bool [rows, T + 1]: the token is to be predicted; the first column means nothing


class Rows(NamedTuple):
    """Packed documents."""

    tokens: np.ndarray  # int32 [rows, T + 1]
    starts: np.ndarray  # bool [rows, T + 1]: the token is the first of a document


def to_batch(rows: Rows, mask_documents: bool) -> Batch:
    """The batch of some rows, with attention and predictions within documents if `mask_documents`."""
    starts = rows.starts & mask_documents
    starts[:, 0] = False
    return Batch(rows.tokens, np.cumsum(starts, axis=1, dtype=np.int32), ~starts)


def fill_in_the_middle(tokens: np.ndarray, tokenizer: Tokenizer, rng: np.random.Generator) -> np.ndarray:
    """A document as `<fim_begin> prefix <fim_hole> suffix <fim_end> middle <end>`, cut at two uniform places.

    DeepSeek-V3's prefix-suffix-middle form (section 4.1), which it applies to documents before packing.
    """
    assert tokenizer.fim is not None
    body = tokens[:-1] if tokens[-1] == tokenizer.end_id else tokens
    first, second = sorted(rng.integers(0, len(body), size=2, endpoint=True))
    begin, hole, end = tokenizer.fim
    parts = ([begin], body[:first], [hole], body[second:], [end], body[first:second], [tokenizer.end_id])
    return np.concatenate(parts, dtype=np.int32)


def endless(documents: Documents, tokenizer: Tokenizer, fim_rate: float, seed: int) -> grain.MapDataset:
    """The documents without end, shuffled anew every epoch, a share of them in fill-in-the-middle order.

    Element n depends on n and the seed alone; the order of a document on its number, the epoch and the seed.
    """

    def rearrange(tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return fill_in_the_middle(tokens, tokenizer, rng) if rng.random() < fim_rate else tokens

    dataset = grain.MapDataset.source(documents).seed(seed)
    if fim_rate > 0:
        dataset = dataset.random_map(rearrange)
    return dataset.shuffle().repeat()


class Packer:
    """Joins documents one after the other and cuts the result into rows. `document` and `used` are its state."""

    def __init__(self, documents: Any, length: int):
        """`documents`: indexed by number, gives the tokens of one; `length`: tokens of a row."""
        self._documents, self._length = documents, length
        self.seek(0, 0)

    def seek(self, document: int, used: int) -> None:
        """Goes to where `used` tokens of document number `document` are used."""
        self.document, self.used = document, used
        self._tokens: np.ndarray | None = None  # of that document, once it is read

    def rows(self, count: int) -> Rows:
        """The next `count` rows."""
        tokens = np.empty(count * self._length, np.int32)
        starts = np.zeros(tokens.shape, bool)
        filled = 0
        while filled < len(tokens):
            if self._tokens is None:
                self._tokens = self._documents[self.document]
            part = self._tokens[self.used : self.used + len(tokens) - filled]
            tokens[filled : filled + len(part)] = part
            starts[filled] |= self.used == 0
            filled += len(part)
            self.used += len(part)
            if self.used == len(self._tokens):
                self.seek(self.document + 1, 0)
        return Rows(tokens.reshape(count, self._length), starts.reshape(count, self._length))


class Shard:
    """One virtual shard: a packer for each source, and the choice of the source of each row."""

    def __init__(self, sources: Sequence[Any], weights: Sequence[float], offset: float, length: int):
        """`sources`: the shard's documents of each source; `weights`: their shares of the rows; `offset`: v / V."""
        self._packers = [Packer(source, length) for source in sources]
        self._bounds = np.cumsum(weights)[:-1] / sum(weights)
        self._offset = offset
        self._row = 0

    def rows(self, count: int) -> Rows:
        """The next `count` rows."""
        places = (self._offset + np.arange(self._row, self._row + count) * GOLDEN_RATIO) % 1
        self._row += count
        source = np.searchsorted(self._bounds, places, side="right")
        parts = [packer.rows(int((source == index).sum())) for index, packer in enumerate(self._packers)]
        order = np.argsort(np.argsort(source, kind="stable"))
        return Rows(*(np.concatenate(arrays)[order] for arrays in zip(*parts, strict=True)))

    def state(self) -> dict[str, Any]:
        """Where the shard is: rows given, and each packer's document and the tokens used of it."""
        return {"row": self._row, "packers": [[packer.document, packer.used] for packer in self._packers]}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken."""
        self._row = state["row"]
        for packer, (document, used) in zip(self._packers, state["packers"], strict=True):
            packer.seek(document, used)


class TrainBatches:
    """The endless training batches, or the part of them that one host reads."""

    def __init__(
        self,
        sources: Sequence[Documents],
        tokenizer: Tokenizer,
        config: DataConfig,
        *,
        seed: int,
        host: int = 0,
        num_hosts: int = 1,
    ):
        """`sources`: what `data.weights` mixes, one or all."""
        self._num_shards = config.virtual_shards
        if self._num_shards % num_hosts:
            raise ConfigError("data.virtual_shards", self._num_shards, f"a multiple of the {num_hosts} hosts")
        self._mask_documents = config.mask_documents
        self._fingerprint = _fingerprint(sources, tokenizer, config, seed)
        seeds = np.random.SeedSequence(seed % 2**64).generate_state(len(sources))
        streams = [
            endless(source, tokenizer, config.fim_rate, int(source_seed))
            for source, source_seed in zip(sources, seeds, strict=True)
        ]
        weights = config.weights or (1.0,)
        self._shards = {
            v: Shard(
                [s[v :: self._num_shards] for s in streams], weights, v / self._num_shards, config.sequence_length + 1
            )
            for v in range(host * self._num_shards // num_hosts, (host + 1) * self._num_shards // num_hosts)
        }

    def next(self, rows: int) -> Batch:
        """The next batch of `rows` rows over all hosts, of which this host's are returned.

        Raises:
            ValueError: `rows` is not a multiple of the number of virtual shards.
        """
        if rows % self._num_shards:
            raise ValueError(f"rows={rows} is not a multiple of data.virtual_shards={self._num_shards}")
        parts = [shard.rows(rows // self._num_shards) for shard in self._shards.values()]
        return to_batch(Rows(*map(np.concatenate, zip(*parts, strict=True))), self._mask_documents)

    def state(self) -> dict[str, Any]:
        """The position of this host's shards, for JSON; `merge_states` joins those of all hosts."""
        return {"data": self._fingerprint, "shards": {str(v): shard.state() for v, shard in self._shards.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken, on any number of hosts. It must have all shards of this host.

        Raises:
            ConfigError: the state is of other text, another tokenizer, or other settings that move tokens.
        """
        if state["data"] != self._fingerprint:
            wanted = f"the text, tokenizer, seed and data settings that the position is of ({state['data']})"
            raise ConfigError("data", self._fingerprint, wanted)
        for v, shard in self._shards.items():
            shard.restore(state["shards"][str(v)])


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The position of all shards, out of the states of all hosts."""
    return {**states[0], "shards": {v: shard for state in states for v, shard in state["shards"].items()}}


def _fingerprint(sources: Sequence[Documents], tokenizer: Tokenizer, config: DataConfig, seed: int) -> str:
    """A hash of everything that decides which tokens a batch has."""
    settings = (config.sequence_length, config.virtual_shards, config.fim_rate, config.weights, seed)
    content = hashlib.blake2b(repr((tokenizer.fingerprint, settings)).encode(), digest_size=8)
    for source in sources:
        for array in (*(file.hashes for file in source.files), source.file, source.start, source.length):
            content.update(array.tobytes())
    return content.hexdigest()


class Prefetcher:
    """Training batches made ahead of time by one thread. `state` is always that of the batches handed out."""

    def __init__(self, batches: TrainBatches, depth: int = 2):
        """`depth`: batches that are made ahead."""
        self._batches, self._depth = batches, depth
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._ahead: deque[tuple[int, Future]] = deque()  # rows asked for, (batch, state after it)
        self._state = batches.state()
        self._waited = 0.0

    @property
    def waited(self) -> float:
        """Seconds that `next` has waited for batches, in all."""
        return self._waited

    def next(self, rows: int) -> Batch:
        """The next batch, as of `TrainBatches.next`. The ones after it are expected to have as many rows."""
        start = time.perf_counter()
        if self._ahead and self._ahead[0][0] != rows:
            self.restore(self._state)
        while len(self._ahead) <= self._depth:
            self._ahead.append((rows, self._thread.submit(self._make, rows)))
        batch, self._state = self._ahead.popleft()[1].result()
        self._waited += time.perf_counter() - start
        return batch

    def _make(self, rows: int) -> tuple[Batch, dict[str, Any]]:
        return self._batches.next(rows), self._batches.state()

    def state(self) -> dict[str, Any]:
        """The position after the last batch that `next` returned."""
        return self._state

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken; see `TrainBatches.restore`."""
        self._drop()
        self._batches.restore(state)
        self._state = state

    def close(self) -> None:
        """Ends the thread."""
        self._drop()
        self._thread.shutdown()

    def _drop(self) -> None:
        while self._ahead:
            future = self._ahead.popleft()[1]
            if not future.cancel():
                future.exception()  # waits for the batch that is being made
