"""The data of a run, from the settings to the batches: `open_data`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from moejax.config import ConfigError, DataConfig
from moejax.data.batches import Batch, Packer, Prefetcher, Rows, TrainBatches, to_batch
from moejax.data.cache import open_tokens
from moejax.data.documents import Documents, pieces, split
from moejax.data.sources import find_sources
from moejax.data.tokens import Tokenizer, open_tokenizer


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """Text as a run sees it."""

    config: DataConfig
    tokenizer: Tokenizer
    train: Prefetcher
    train_documents: tuple[Documents, ...]  # all, or one for each source of a mix
    valid_documents: Documents  # none without validation
    host: int
    num_hosts: int

    @property
    def num_train_tokens(self) -> int:
        """Tokens of one epoch, before fill-in-the-middle."""
        return sum(source.num_tokens for source in self.train_documents)

    @property
    def num_valid_tokens(self) -> int:
        """Tokens of all validation documents."""
        return self.valid_documents.num_tokens

    def valid_batches(self, num_batches: int, rows: int) -> list[Batch]:
        """At most `num_batches` batches of `rows` rows over all hosts, of which this host's are returned.

        They are the same every time: rows at equal distances in all validation text, without fill in the middle. If
        the text has fewer rows there are fewer batches, and the last is filled up with rows whose `loss_mask` is false.
        Without validation the list is empty.
        """
        length = self.config.sequence_length + 1
        there = self.num_valid_tokens // length
        count = min(num_batches * rows, there)
        if count == 0:
            return []
        batches = []
        for first in range(0, count, rows):
            number = first + np.arange(self.host * rows // self.num_hosts, (self.host + 1) * rows // self.num_hosts)
            packed = self._valid_rows(number % count * there // count * length)
            batch = to_batch(packed, self.config.mask_documents)
            batches.append(replace(batch, loss_mask=batch.loss_mask & (number < count)[:, None]))
        return batches

    def _valid_rows(self, offsets: np.ndarray) -> Rows:
        """The rows that start at these offsets in the joined validation documents."""
        packer = Packer(self.valid_documents, self.config.sequence_length + 1)
        ends = np.cumsum(self.valid_documents.length)
        parts = []
        for offset in offsets:
            document = int(np.searchsorted(ends, offset, side="right"))
            packer.seek(document, int(offset - ends[document] + self.valid_documents.length[document]))
            parts.append(packer.rows(1))
        return Rows(*map(np.concatenate, zip(*parts, strict=True)))

    @cached_property
    def unigram_loss(self) -> float | None:
        """What a model that knows only how often each token occurs would get, in nats per validation token.

        The frequencies are those of the training text with one added to each count. None without validation.
        """
        if not self.num_valid_tokens:
            return None
        size = self.tokenizer.vocab_size
        train = 1 + np.sum([source.count_tokens(size) for source in self.train_documents], axis=0)
        valid = self.valid_documents.count_tokens(size)
        return float(-(valid / valid.sum()) @ np.log(train / train.sum()))


def open_data(
    config: DataConfig, *, vocab_size: int, seed: int, cache: str | Path, host: int = 0, num_hosts: int = 1
) -> Data:
    """The tokenizer, the training batches and the validation text of a run; text is tokenised if it is not cached.

    Args:
        config: what to read and how.
        vocab_size: of the model; the tokenizer may have fewer.
        seed: of the shuffles and of fill-in-the-middle.
        cache: folder of the token files, which hosts may share.
        host: number of this host; it reads its part of every batch.
        num_hosts: divides `data.virtual_shards`.

    Raises:
        ConfigError: any setting or file that cannot be used.
    """
    if not config.train:
        raise ConfigError("data.train", config.train, "at least one file, folder or glob")
    tokenizer = open_tokenizer(config.tokenizer, vocab_size=vocab_size, fim_rate=config.fim_rate)
    found = {name: find_sources(config, name) for name in ("train", "valid")}
    train, valid = ([open_tokens(source, tokenizer, cache) for source in sources] for sources in found.values())
    pools, valid_documents = split(train, valid, config.valid_fraction, by_source=bool(config.weights))
    _require_rows(pools, valid_documents, config)
    cut = [pieces(pool, config.sequence_length, config.virtual_shards) for pool in pools]
    batches = TrainBatches(cut, tokenizer, config, seed=seed, host=host, num_hosts=num_hosts)
    return Data(
        config=config,
        tokenizer=tokenizer,
        train=Prefetcher(batches),
        train_documents=tuple(cut),
        valid_documents=valid_documents,
        host=host,
        num_hosts=num_hosts,
    )


def _require_rows(pools: Sequence[Documents], valid: Documents, config: DataConfig) -> None:
    """Raises ConfigError unless each shard can fill a row of each pool, and validation one."""
    length, shards = config.sequence_length + 1, config.virtual_shards
    for index, pool in enumerate(pools):
        if pool.num_tokens < shards * length:
            rows = f"{shards} (data.virtual_shards) rows of {length} (data.sequence_length and one more)"
            wanted = f"at least {shards * length} training tokens, {rows}, not {pool.num_tokens}"
            if config.weights:
                raise ConfigError(f"data.train[{index}]", config.train[index], wanted)
            raise ConfigError("data.train", config.train, wanted)
    if valid.num_tokens < length and (config.valid or config.valid_fraction > 0):
        name = "valid" if config.valid else "valid_fraction"
        wanted = f"at least {length} validation tokens (data.sequence_length and one more), not {valid.num_tokens}"
        raise ConfigError(f"data.{name}", getattr(config, name), wanted)
