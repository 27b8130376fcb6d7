"""What a device computes for one micro-batch: every operation with its FLOPs, or the bytes that it reads and writes.

The operations are those of the code that runs: `model`, `ops`, what `model.remat` computes again, the casts and copies
around FP8 products and the exchange. Routing is balanced. Products cost their FLOPs; what else there is costs its
bytes, each array read or written once by each fusion or kernel that XLA or `kernels` makes of it.

T tokens of a device, D model dim, R rows of routed experts.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from moejax.config import RunConfig
from moejax.ops.hops import Exchange, plan_exchange

Side = Literal["F", "I", "W"]
# Of a layer: up to the dispatch of its tokens, from there to the combine, and after it; of a backward pass the reverse.
Piece = Literal["attention", "experts", "end"]
COPIES = "copies of activations"


@dataclass(frozen=True)
class Operation:
    """Work of one micro-batch on one device; a product has FLOPs, and everything else bytes."""

    name: str  # what it is for, as in the table of `moejax plan`
    side: Side
    piece: Piece
    kind: str  # of hardware.KINDS
    flops: float = 0.0
    bytes: float = 0.0


def microbatch_tokens(config: RunConfig) -> int:
    """Tokens of a micro-batch on a device."""
    return config.rows_of_microbatch // config.mesh.batch_shards * config.data.sequence_length


def exchange_of(config: RunConfig, tokens: int) -> Exchange:
    """How an MoE layer's tokens travel."""
    mesh, fp8 = config.mesh, config.precision == "fp8"
    return plan_exchange(config.model.moe, tokens, mesh.expert, mesh.expert_nodes, mesh.exchange_slack, fp8)


def kept_bytes(config: RunConfig) -> float:
    """What the forward pass of an MoE layer leaves for the backward pass, but for small arrays (`model.block.KEPT`)."""
    model, tokens, item = config.model, microbatch_tokens(config), 4 if config.precision == "fp32" else 2
    if model.remat == "full":
        return float(item * tokens * model.hidden_size)
    a, exchange = model.attention, exchange_of(config, tokens)
    fp8, width = config.precision == "fp8", a.num_heads * a.v_dim
    widths = 2 * model.hidden_size + a.kv_lora_rank + a.qk_rope_dim + (a.q_lora_rank or 0)
    sent = model.hidden_size * (exchange.hops[-1].rows if exchange.hops else 0)  # by the last hop, as it travelled
    rows = exchange.max_rows or tokens * model.moe.top_k
    hidden = (rows + tokens * model.moe.num_shared) * 2 * model.moe.expert_width
    if fp8:
        return float(item * tokens * widths + 1.5 * tokens * width + sent + hidden)
    return float(item * (tokens * (widths + width) + sent + hidden))


def block(config: RunConfig, kind: Literal["dense", "moe"]) -> list[Operation]:
    """One layer, forward and backward."""
    made = _Work(config)
    found = [*made.attention(), *(made.moe() if kind == "moe" else made.mlp("feed-forward", config.model.dense_width))]
    if config.model.remat == "full":
        found += [replace(op, side="I") for op in found if op.side == "F"]
    if kind == "moe" and config.mesh.pipe > 1:  # into the pools and out of them
        found += [made.memory(COPIES, side, "end", 2 * kept_bytes(config)) for side in ("F", "I")]
    return found


def head(config: RunConfig) -> list[Operation]:
    """Cross entropy of one prediction for each token; the backward pass computes the logits again, or has them."""
    made, model = _Work(config), config.model
    logits = made.tokens * model.vocab_size
    product = 2.0 * logits * model.hidden_size
    sides: tuple[Side, ...] = ("F", "I") if model.keep_logits else ("F", "I", "I")
    products = [made.product("head", side, "end", "dense", product, fp8=False) for side in sides]
    products.append(made.product("head", "W", "end", "outer", product, fp8=False))
    # FP32 logits written once or twice and read in either pass, their gradient in BF16 written and read twice
    size = 10.0 if model.keep_logits else 14.0
    return [*products, made.memory("head", "F", "end", 8.0 * logits), made.memory("head", "I", "end", size * logits)]


def mtp_module(config: RunConfig) -> list[Operation]:
    """One MTP module without its head: the joining product, never in FP8, and a block."""
    made, dim = _Work(config), config.model.hidden_size
    joined = made.linear("MTP's join", "attention", 2 * dim, dim, fp8=False)
    own = block(config, "moe" if config.model.num_moe_layers else "dense")
    return [*joined, *(op for op in own if op.name != COPIES)]  # what it keeps is not put into pools


def embedding(config: RunConfig) -> list[Operation]:
    """Rows of the table looked up, and their gradients added to it."""
    made = _Work(config)
    size = made.tokens * config.model.hidden_size
    return [
        made.memory("embedding", "F", "attention", 2 * made.item * size),
        made.memory("embedding", "W", "attention", (made.item + 8) * size),
    ]


class _Work:
    """The operations of a config's parts."""

    def __init__(self, config: RunConfig):
        self.config, self.model = config, config.model
        self.fp8, self.dtype = config.precision == "fp8", config.precision
        self.tokens, self.item = microbatch_tokens(config), 4 if config.precision == "fp32" else 2
        self.again = config.model.remat != "none"

    # ------------------------------------------------------------------------------------------------------ operations

    def memory(self, name: str, side: Side, piece: Piece, size: float) -> Operation:
        """Something that takes as long as its bytes."""
        return Operation(name, side, piece, "memory", bytes=size)

    def product(self, name: str, side: Side, piece: Piece, kind: str, flops: float, fp8: bool) -> Operation:
        """A product of matrices: `kind` dense, grouped or outer."""
        kind = "fp32" if self.dtype == "fp32" else f"{kind}_{'fp8' if fp8 else 'bf16'}"
        return Operation(name, side, piece, kind, flops=flops)

    def linear(self, name: str, piece: Piece, inner: int, outer: int, fp8: bool | None = None) -> Iterator[Operation]:
        """`ops.linear.linear`: three products; in FP8 the casts of both their factors, weights at each use."""
        fp8, rows, weights = self.fp8 if fp8 is None else fp8, self.tokens, inner * outer
        flops = 2.0 * rows * weights
        yield self.product(name, "F", piece, "dense", flops, fp8)
        yield self.product(name, "I", piece, "dense", flops, fp8)
        yield self.product(name, "W", piece, "outer", flops, fp8)
        yield self.memory("sums of gradients", "W", piece, 12.0 * weights)  # FP32: two read, one written
        if fp8:
            yield self.memory("casts to FP8", "F", piece, 3.0 * rows * inner + 3.0 * weights)
            yield self.memory("casts to FP8", "I", piece, 4.0 * rows * outer + 3.0 * weights)
            yield self.memory("casts to FP8", "W", piece, 2.0 * rows * inner)

    # ------------------------------------------------------------------------------------------------------ attention

    def attention(self) -> Iterator[Operation]:
        """MLA with its norms and residual; `remat` "cheap" computes norms, up-projections and rotations again."""
        a, dim, tokens, item = self.model.attention, self.model.hidden_size, self.tokens, self.item
        head = a.qk_nope_dim + a.qk_rope_dim
        query, keys_and_values = a.num_heads * head, a.num_heads * (a.qk_nope_dim + a.v_dim)
        up = list(self.linear("projections", "attention", a.kv_lora_rank, keys_and_values))
        down = list(self.linear("projections", "attention", dim, a.kv_lora_rank + a.qk_rope_dim))
        if a.q_lora_rank is None:
            down += self.linear("projections", "attention", dim, query)
        else:
            down += self.linear("projections", "attention", dim, a.q_lora_rank)
            up += self.linear("projections", "attention", a.q_lora_rank, query)
        down += self.linear("projections", "attention", a.num_heads * a.v_dim, dim)
        yield from (*up, *down)
        widths = dim + a.kv_lora_rank + (a.q_lora_rank or 0)
        # queries read and written, keys read and written with the shared part, values copied
        turned = item * tokens * (2 * query + keys_and_values + a.num_heads * (head + a.v_dim))
        again = [op for op in up if op.side == "F"]
        again.append(self.memory("norms and rotations", "F", "attention", turned + 2 * item * tokens * widths))
        yield again[-1]
        yield self.memory("norms and rotations", "I", "attention", turned + 3 * item * tokens * widths)
        yield self.memory("residuals", "F", "attention", 3 * item * tokens * dim)
        yield self.memory("residuals", "I", "attention", 3 * item * tokens * dim)
        if self.model.remat == "cheap":
            yield from (replace(op, side="I") for op in again)
        pairs = tokens * a.num_heads * self.config.data.sequence_length / 2  # the causal half
        kinds = ("fp32", "fp32") if self.dtype == "fp32" else ("attention", "attention_backward")
        yield Operation("attention", "F", "attention", kinds[0], 2 * pairs * (head + a.v_dim))
        # scores again, gradients of values, probabilities, queries and keys
        yield Operation("attention", "I", "attention", kinds[1], 2 * pairs * (3 * head + 2 * a.v_dim))

    # --------------------------------------------------------------------------------------------------- feed-forward

    def mlp(self, name: str, width: int, piece: Piece = "experts") -> Iterator[Operation]:
        """A dense SwiGLU network with the norm before it and the residual after it."""
        yield from self._around_ffn()
        yield from self._swiglu_network(name, width, piece)

    def _around_ffn(self) -> Iterator[Operation]:
        size = self.item * self.tokens * self.model.hidden_size
        yield self.memory("norms and rotations", "F", "attention", 2 * size)
        yield self.memory("norms and rotations", "I", "attention", 3 * size + (2 * size if self.again else 0))
        yield self.memory("residuals", "F", "end", 3 * size)
        yield self.memory("residuals", "I", "attention", 3 * size)

    def _swiglu_network(self, name: str, width: int, piece: Piece) -> Iterator[Operation]:
        yield from self.linear(name, piece, self.model.hidden_size, 2 * width)
        yield from self.linear(name, piece, width, self.model.hidden_size)
        yield from self._swiglu(self.tokens * width, piece)

    def _swiglu(self, size: float, piece: Piece) -> Iterator[Operation]:
        """`size` numbers that leave the activation, of twice as many; the backward pass computes it again."""
        item = self.item
        # FP8: h read in BF16, u and h written in FP8; back: h in FP8 and du read, dh in rows and columns, u in columns
        forward, backward = (2 * item + 1 + 2, 2 + item + 2 + 2 + 1) if self.fp8 else (3 * item, 6 * item)
        yield self.memory("SwiGLU", "F", piece, forward * size)
        yield self.memory("SwiGLU", "I", piece, backward * size)

    def moe(self) -> Iterator[Operation]:
        """The gate, the routed experts with the way there and back, and the shared ones."""
        moe, dim, tokens = self.model.moe, self.model.hidden_size, self.tokens
        yield from self._around_ffn()
        scores = 2.0 * tokens * dim * moe.num_experts
        for side in ("F", "I", "W"):
            yield Operation("router", side, "attention", "fp32", flops=scores)  # type: ignore[arg-type]
        if moe.num_shared:
            yield from self._swiglu_network("shared experts", moe.num_shared * moe.expert_width, "experts")
        rows, width = tokens * moe.top_k, moe.expert_width
        for inner, outer in ((dim, 2 * width), (width, dim)):
            flops = 2.0 * rows * inner * outer
            yield self.product("routed experts", "F", "experts", "grouped", flops, self.fp8)
            yield self.product("routed experts", "I", "experts", "grouped", flops, self.fp8)
            yield self.product("routed experts", "W", "experts", "outer", flops, self.fp8)
        yield from self._swiglu(rows * width, "experts")
        weights = 3.0 * dim * width * moe.num_experts / self.config.mesh.expert
        yield self.memory("sums of gradients", "W", "experts", 12 * weights)
        if self.fp8:
            yield self.memory("casts to FP8", "F", "experts", 3 * weights)
            yield self.memory("casts to FP8", "I", "experts", 3 * weights)
        yield from self._ways()

    def _ways(self) -> Iterator[Operation]:
        """Rows gathered for each hop and for the experts, cast for FP8, and summed on the way back."""
        name, item, dim = "rows to experts and back", self.item, self.model.hidden_size
        exchange = exchange_of(self.config, self.tokens)
        rows = float(self.tokens * self.model.moe.top_k)
        sizes = [self.tokens, *(hop.rows for hop in exchange.hops)]
        sent = 1 if self.fp8 else item
        there, again = 2 * sent * rows, 0.0  # gathered; cast to FP8 and back, of gradients at each hop
        back = item * (rows + sizes[-1])
        for before, after in itertools.pairwise(sizes):
            there += 2 * sent * after
            again += (item + 1) * (before + after)
            back += item * (after + before)
        # forward and backward alike: what one dispatches the other combines
        casts = ((item + 1) * self.tokens, again + (item + 1) * sizes[-1]) if self.fp8 else (0, 0)
        yield self.memory(name, "F", "experts", dim * (there + back + casts[0]))
        yield self.memory(name, "I", "experts", dim * (there + back + casts[1]))
        if self.fp8:  # both factors of the gradients gathered in FP8 and cast to columns
            yield self.memory("casts to FP8", "W", "experts", 2 * dim * 4 * rows)
        else:
            yield self.memory(name, "W", "experts", 2 * item * dim * rows)
