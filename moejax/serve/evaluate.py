"""How well a model predicts text that it has not seen, domain by domain, and which experts read it.

The documents of a domain are joined as in training, each with its end token, and attention stays within a document if
`data.mask_documents` says so. A window of `length` tokens reads, and moves by `stride`: by its length, so that every
token but the first is predicted once, from up to `length` before it; by less, so that it slides, and each has at least
`length - stride` before it; or by one more, which are the rows of training, whose first tokens are not predicted.
"""

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moejax.config import ConfigError, DataConfig, Precision
from moejax.data.cache import TokenFile, open_tokens
from moejax.data.sources import Source, find_sources
from moejax.data.tokens import Tokenizer
from moejax.serve.load import Model, load
from moejax.serve.reader import Reader
from moejax.train.source import saved_config

LONGEST = 4096  # of a window, unless another length is asked for
LISTED = 5  # most specialised experts of a domain


@dataclass(frozen=True)
class Score:
    """How well text is predicted."""

    loss: float  # nats per token
    perplexity: float  # of a token
    bits_per_byte: float | None  # of text; None: the tokens stand for no bytes
    tokens: int  # that were predicted
    bytes: int  # that these stand for


@dataclass(frozen=True)
class Specialist:
    """An expert that a domain uses more than the others do."""

    layer: int  # of the model, dense ones counted
    expert: int
    share: float  # of the domain's choices in that layer
    times: float  # that share, relative to the one in all domains


@dataclass(frozen=True)
class Domain:
    """One domain."""

    name: str
    score: Score
    share: list[list[float]]  # of the choices of each MoE layer, by expert; a layer's sum to 1
    entropy: list[float]  # of these, by layer, relative to that of equal shares
    specialists: list[Specialist]  # most specialised first; none where there is one domain


@dataclass(frozen=True)
class Evaluation:
    """What came of `evaluate`."""

    domains: list[Domain]
    total: Score  # all tokens alike
    length: int
    stride: int


def evaluate(
    model: Model | str | Path,
    files: Sequence[str | Path],
    *,
    length: int | None = None,
    stride: int | None = None,
    rows: int = 8,
    reading: DataConfig | None = None,
    precision: Precision | None = None,
) -> Evaluation:
    """Reads text with a model, windows at a time.

    Args:
        model: or what `moejax.load` takes.
        files: files, folders and globs, as in `data.train`. Each is a domain, but of a folder each folder directly in
            it is one, and the files directly in it one more.
        length: tokens that a window reads; None: the model's context, at most LONGEST.
        stride: see above; None: the length.
        rows: windows at a time.
        reading: `text_field`, `bad_line`, `exclude` and `mask_documents`; None: those of the run, else the defaults.
        precision: as `moejax.load` takes it; only where that loads the model.

    Raises:
        ConfigError: text that cannot be read, a model without a tokenizer, or a number that does not fit.
    """
    if isinstance(model, Model):
        if precision is not None:
            raise ConfigError("precision", precision, "none where the model is loaded already")
    else:
        reading = reading or _settings(Path(model))
    reading = reading or DataConfig()
    domains = _domains(files, reading)  # what can be wrong with words comes before what takes time
    _require_above_0(length=length, stride=stride, rows=rows)
    model = model if isinstance(model, Model) else load(model, precision=precision)
    if model.tokenizer is None:
        raise ConfigError("RUN", "", "a model whose folder has a tokenizer.json")
    length = min(model.context, LONGEST) if length is None else length
    stride = length if stride is None else stride
    if stride > length + 1:
        raise ConfigError("stride", stride, f"at most {length + 1}, the tokens of a window and one")
    reader, sums = Reader(model), {}
    with tempfile.TemporaryDirectory() as cache:
        for source in domains:
            with _named():
                text = open_tokens(source, model.tokenizer, cache)
            windows = _windows(text, length, stride, rows, reading.mask_documents)
            sums[source.entry] = _Sums.of(reader, windows, model.config.moe.num_experts, model.tokenizer)
    return _evaluation(sums, model.config.num_dense_layers, length, stride)


def _require_above_0(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value <= 0:
            raise ConfigError(name, value, "a number above 0")


# ------------------------------------------------------------------------------------------------------- what is read


def _settings(folder: Path) -> DataConfig | None:
    """How the run of a folder reads text; None: it is no run's."""
    with contextlib.suppress(ConfigError, OSError):
        is_checkpoint = folder.name.isdigit() and (folder / "meta").is_dir()
        return saved_config(folder if is_checkpoint else folder / "checkpoints" / "any").data
    return None


def _domains(files: Sequence[str | Path], reading: DataConfig) -> list[Source]:
    """The files of each domain; its name is the `entry`."""
    if not files:
        raise ConfigError("DATA", "", "at least one file, folder or glob")
    with _named():
        sources = find_sources(reading, "eval", map(str, files))
    found: dict[str, Source] = {}
    for source in sources:
        groups: dict[str, list[Path]] = {}
        for path in source.files:
            folder = Path(source.entry).expanduser()
            inside = path.relative_to(folder).parts if folder.is_dir() else ()
            name = str(Path(source.entry) / inside[0]) if len(inside) > 1 else source.entry
            groups.setdefault(name, []).append(path)
        for name, paths in groups.items():
            if name in found:
                raise ConfigError("DATA", name, "each domain once")
            found[name] = dataclasses.replace(source, entry=name, files=tuple(paths))
    return list(found.values())


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Errors of files name the word of the command line that they are."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(
            "DATA" if error.place.startswith("data.eval") else error.place, error.value, error.wanted
        ) from (None)


@dataclass(frozen=True, eq=False)
class _Windows:
    """Rows of N = length + 1 tokens."""

    tokens: np.ndarray  # int32 [B, N]
    segments: np.ndarray  # int32 [B, N]
    asked: np.ndarray  # bool [B, N - 1]: the prediction from here counts


def _windows(text: TokenFile, length: int, stride: int, rows: int, mask_documents: bool) -> Iterator[_Windows]:
    """All windows of a text, `rows` at a time; what is missing in the last is not asked for."""
    size = len(text.tokens)
    starts = np.arange(0, max(size - 1 - length, 0) + stride, stride)
    starts = starts[starts < max(size - 1, 1)]
    is_start = np.zeros(size, bool)
    is_start[text.offsets[:-1]] = mask_documents
    for first in range(0, len(starts), rows):
        own = np.full(rows, size)  # beyond the end: nothing of it is read
        own[: len(starts[first : first + rows])] = starts[first : first + rows]
        place = own[:, None] + np.arange(length + 1)
        there = place < size
        inside = np.minimum(place, size - 1)
        begins = is_start[inside] & there
        scored_before = np.where(own == 0, 0, own - stride + length)[:, None]  # the last token of the window before
        asked = there[:, 1:] & (place[:, 1:] > scored_before) & ~begins[:, 1:]
        tokens = np.where(there, text.tokens[inside], 0).astype(np.int32)
        begins[:, 0] = False
        yield _Windows(tokens, np.cumsum(begins, axis=1, dtype=np.int32), asked)


# ----------------------------------------------------------------------------------------------------- what is counted


@dataclass(frozen=True, eq=False)
class _Sums:
    nats: float
    tokens: int
    bytes: int
    counts: np.ndarray  # int64 [L, E]: choices of each expert, of the tokens whose prediction counts

    @classmethod
    def of(cls, reader: Reader, windows: Iterator[_Windows], num_experts: int, tokenizer: Tokenizer) -> "_Sums":
        nats, tokens, size, counts = 0.0, 0, 0, np.zeros((0, num_experts), np.int64)
        for part in windows:
            found, asked = reader(part.tokens, part.segments), part.asked
            nats += float(found.nats[asked].sum(dtype=np.float64))
            tokens += int(asked.sum())
            size += int(tokenizer.token_bytes[part.tokens[:, 1:][asked]].sum())
            own = [np.bincount(layer[asked].ravel(), minlength=num_experts) for layer in found.experts]
            counts = np.array(own, np.int64).reshape(-1, num_experts) + (counts if len(counts) else 0)
        return cls(nats, tokens, size, counts)

    @property
    def score(self) -> Score:
        loss = self.nats / self.tokens if self.tokens else math.nan
        bits = self.nats / math.log(2) / self.bytes if self.bytes else None
        return Score(loss, float(np.exp(loss)), bits, self.tokens, self.bytes)


def _evaluation(sums: dict[str, _Sums], dense_layers: int, length: int, stride: int) -> Evaluation:
    for name, one in sums.items():
        if not one.tokens:
            raise ConfigError("DATA", name, "text of at least two tokens in a document")
    parts = list(sums.values())
    counts = sum((part.counts for part in parts[1:]), parts[0].counts)
    whole = _Sums(sum(p.nats for p in parts), sum(p.tokens for p in parts), sum(p.bytes for p in parts), counts)
    everywhere = _shares(counts)
    domains = []
    for name, one in sums.items():
        share = _shares(one.counts)
        specialists = _specialists(share, everywhere, dense_layers) if len(sums) > 1 else []
        domains.append(Domain(name, one.score, share.tolist(), _entropies(share), specialists))
    return Evaluation(domains, whole.score, length, stride)


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts / counts.sum(-1, keepdims=True)


def _entropies(share: np.ndarray) -> list[float]:
    """Of each layer, 1 for equal shares."""
    terms = -share * np.log(np.where(share > 0, share, 1))
    return (terms.sum(-1) / math.log(max(share.shape[-1], 2))).tolist()


def _specialists(share: np.ndarray, everywhere: np.ndarray, dense_layers: int) -> list[Specialist]:
    """Experts with at least an equal share, by how much larger it is here than everywhere."""
    times = np.where(share * share.shape[-1] >= 1, share / np.where(everywhere > 0, everywhere, 1), 0)
    order = np.argsort(-times, axis=None, kind="stable")[:LISTED]
    found = [(int(i // share.shape[-1]), int(i % share.shape[-1])) for i in order]
    return [
        Specialist(layer + dense_layers, expert, float(share[layer, expert]), float(times[layer, expert]))
        for layer, expert in found
        if times[layer, expert] > 1
    ]
