"""Tokenizers: bytes, and the byte-level BPE of a `tokenizer.json`; and the training of one.

Special tokens have the names of DeepSeek-V3's published tokenizer. Text never becomes a special token, even where it
spells the name of one: documents must not be able to end themselves.
"""

import abc
import hashlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from moejax.config import ConfigError, DataConfig
from moejax.data.sources import find_sources, read_documents


def _special(words: str) -> str:
    """DeepSeek's spelling of a special token: full-width bars, and U+2581 for spaces."""
    return f"<\uff5c{words}\uff5c>".replace(" ", "\u2581")


BEGIN = _special("begin of sentence")
END = _special("end of sentence")
PAD = _special(" pad ")
FIM_HOLE = _special("fim hole")
FIM_BEGIN = _special("fim begin")
FIM_END = _special("fim end")
SPECIAL_TOKENS = (BEGIN, END, PAD, FIM_HOLE, FIM_BEGIN, FIM_END)

# The three splits of DeepSeek-V3's published tokenizer.json, in their order.
DIGITS = r"\p{N}{1,3}"
CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


class FimIds(NamedTuple):
    """Ids of the tokens of fill-in-the-middle: begin, prefix, hole, suffix, end, middle."""

    begin: int
    hole: int
    end: int


class Tokenizer(abc.ABC):
    """Text to token ids and back."""

    vocab_size: int  # ids are below this
    end_id: int  # ends a document
    begin_id: int | None
    fim: FimIds | None  # None: the tokenizer has no such tokens
    token_bytes: np.ndarray  # int32 [vocab_size]: bytes of text that each token stands for; special tokens 0
    fingerprint: str  # equal for tokenizers that give equal tokens

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, without special tokens."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self.encode_batch([text])[0].tolist()

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids. Special tokens and ids that stand for nothing are left out; bad UTF-8 is U+FFFD."""


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are bytes of UTF-8, then begin, end, pad, fim hole, fim begin, fim end."""

    def __init__(self) -> None:
        self.vocab_size = 256 + len(SPECIAL_TOKENS)
        self.begin_id, self.end_id, _, hole, begin, end = range(256, self.vocab_size)
        self.fim = FimIds(begin, hole, end)
        self.token_bytes = (np.arange(self.vocab_size) < 256).astype(np.int32)
        self.fingerprint = "bytes"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The UTF-8 of each text, uint8."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids below 256."""
        return bytes(index for index in ids if 0 <= index < 256).decode(errors="replace")


def bytes_as_file() -> str:
    """The ids of ByteTokenizer as a tokenizer.json, for tools that know no other tokenizer."""
    # byte-level vocabularies spell a byte as a character: itself where that can be seen, else one from 256 on, in order
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), 256)}
    others = itertools.count(256)
    vocabulary = {chr(byte if byte in seen else next(others)): byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer.to_str()


class FileTokenizer(Tokenizer):
    """The tokenizer of a `tokenizer.json` of the `tokenizers` library. It must have an end-of-sentence token."""

    def __init__(self, path: str) -> None:
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError("data.tokenizer", path, '"bytes", or a tokenizer.json that exists') from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("data.tokenizer", path, f"a tokenizer.json that can be read ({error})") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError("data.tokenizer", path, f"a tokenizer.json ({error})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # which means: as the text they are spelled with
        vocabulary = self._tokenizer.get_vocab()
        if END not in vocabulary:
            raise ConfigError("data.tokenizer", path, f"a tokenizer with the token {END}, which ends a document")
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have holes
        self.begin_id, self.end_id = vocabulary.get(BEGIN), vocabulary[END]
        fim = [vocabulary[name] for name in (FIM_BEGIN, FIM_HOLE, FIM_END) if name in vocabulary]
        self.fim = FimIds(*fim) if len(fim) == 3 else None
        self.token_bytes = self._count_bytes(vocabulary)
        self.fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int64, without special tokens."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids that are not special."""
        known = [index for index in ids if 0 <= index < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def _count_bytes(self, vocabulary: dict[str, int]) -> np.ndarray:
        """Bytes of each token: one per character in byte-level vocabularies, else those of its UTF-8."""
        byte_level = '"ByteLevel"' in self._tokenizer.to_str()
        added = self._tokenizer.get_added_tokens_decoder()
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, index in vocabulary.items():
            if index in added:
                sizes[index] = 0 if added[index].special else len(token.encode())
            elif byte_level:
                sizes[index] = len(token)
            else:  # SentencePiece's spelling of spaces and of single bytes
                is_byte = len(token) == 6 and token.startswith("<0x")
                sizes[index] = 1 if is_byte else len(token.replace("▁", " ").encode())
        return sizes


def open_tokenizer(name: str, *, vocab_size: int, fim_rate: float = 0.0) -> Tokenizer:
    """The tokenizer `name` ("bytes", or the path of a tokenizer.json) for a model with `vocab_size` ids.

    Raises:
        ConfigError: the file is missing or is no tokenizer, it has no end-of-sentence token, it has no
            fill-in-the-middle tokens and `fim_rate` is above 0, or it has more ids than the model.
    """
    tokenizer = ByteTokenizer() if name == "bytes" else FileTokenizer(name)
    if tokenizer.vocab_size > vocab_size:
        wanted = f"a tokenizer of at most model.vocab_size={vocab_size} tokens, this one has {tokenizer.vocab_size}"
        raise ConfigError("data.tokenizer", name, wanted)
    if fim_rate > 0 and tokenizer.fim is None:
        wanted = f"a tokenizer with {FIM_BEGIN}, {FIM_HOLE} and {FIM_END}, because data.fim_rate={fim_rate} is above 0"
        raise ConfigError("data.tokenizer", name, wanted)
    return tokenizer


def train_tokenizer(entries: Sequence[str], vocab_size: int, out: str | Path, config: DataConfig) -> int:
    """Trains a byte-level BPE on text, writes it to `out` as a tokenizer.json, and returns its number of tokens.

    Text is split before merging as DeepSeek-V3's tokenizer does. The special tokens have the first ids. There may be
    fewer than `vocab_size` tokens if the text has no more pairs to merge.

    Args:
        entries: files, folders and globs, as in `data.train`.
        vocab_size: number of tokens, the bytes and the special tokens included.
        out: the file to write; its folder is created.
        config: how the files are read (`exclude`, `text_field`, `bad_line`).

    Raises:
        ConfigError: the text cannot be read, `vocab_size` is too small, or `out` cannot be written.
    """
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ConfigError("vocab_size", vocab_size, f"at least {least}: 256 bytes and {len(SPECIAL_TOKENS)} special")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (DIGITS, CJK, WORDS)]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = find_sources(config, "train", entries)
    texts = (text for source in sources for text, _ in read_documents(source))
    tokenizer.train_from_iterator(texts, trainer)
    out = Path(out).expanduser()
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(tokenizer.to_str(), encoding="utf-8")
        temporary.replace(out)
    except OSError as error:
        raise ConfigError("out", str(out), f"a file that can be written ({error.strerror})") from None
    return tokenizer.get_vocab_size()
