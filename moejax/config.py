"""Every setting of a run, as a tree of frozen dataclasses (`RunConfig` is the root).

Defaults of the model, the optimizer and the schedules are DeepSeek-V3's (arXiv:2412.19437, sections 2 and 4.2). A
variation is `dataclasses.replace(...)`; the JSON form (`to_json`, `from_json`) is what a run folder keeps.

A field's comment is its help text on the command line. A bad value raises `ConfigError`, whose one line names the
value, what was wanted and the place in the tree.
"""

import dataclasses
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

Precision = Literal["fp32", "bf16", "fp8"]


class ConfigError(ValueError):
    """A setting, or a file that a setting names, cannot be used. `str(error)` is one line for the user."""

    def __init__(self, place: str, value: object, wanted: str):
        """`place`: path in the tree, `model.moe.num_experts`; `wanted`: continues the words "wanted ..."."""
        super().__init__(f"{place}={value!r}: wanted {wanted}")
        self.place, self.value, self.wanted = place, value, wanted

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback."""
        return [f"moejax: {self}"]


def _require(good: bool, place: str, value: object, wanted: str) -> None:
    if not good:
        raise ConfigError(place, value, wanted)


def _require_positive(part: object, place: str, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        _require(value is None or value > 0, f"{place}.{name}".lstrip("."), value, "a number above 0")


def _require_at_least_0(part: object, place: str, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        _require(value >= 0, f"{place}.{name}", value, "0 or more")


# ------------------------------------------------------------------------------------------------------------- model


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """Extension of the rotary frequencies to long context (YaRN; section 4.3); setting a field turns it on."""

    factor: float = 40.0  # how many times longer than the original length
    original_length: int = 4096  # tokens, the length before the extension
    beta_fast: float = 32.0  # rotations above which a frequency is kept
    beta_slow: float = 1.0  # rotations below which a frequency is divided by the factor
    mscale: float = 1.0  # scale of cos and sin, relative to mscale_all_dim
    mscale_all_dim: float = 1.0  # the softmax scale grows by (0.1 * mscale_all_dim * ln(factor) + 1) squared

    def __post_init__(self) -> None:
        _require(self.factor >= 1, "model.attention.yarn.factor", self.factor, "1 or more")
        _require_positive(self, "model.attention.yarn", "original_length", "beta_fast", "beta_slow")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Multi-head latent attention (section 2.1.1)."""

    num_heads: int = 128
    q_lora_rank: int | None = 1536  # width of the compressed query; None: the query is projected directly
    kv_lora_rank: int = 512  # width of the compressed keys and values
    qk_nope_dim: int = 128  # per head, without position
    qk_rope_dim: int = 64  # per head, rotated; the key's is shared by all heads
    v_dim: int = 128  # per head
    rope_theta: float = 10000.0
    yarn: YarnConfig | None = None
    block: int = 512  # tokens of a query or key block; memory is linear in the length beyond it

    def __post_init__(self) -> None:
        place = "model.attention"
        _require_positive(self, place, "num_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_dim", "qk_rope_dim")
        _require_positive(self, place, "v_dim", "rope_theta", "block")
        _require(self.qk_rope_dim % 2 == 0, f"{place}.qk_rope_dim", self.qk_rope_dim, "an even number")


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Weights of the auxiliary balance losses (V3 section 2.1.2; V2 report section 2.2.3). 0 turns one off."""

    sequence: float = 1e-4  # over the experts, per sequence (V2 calls it expert-level)
    device: float = 0.0  # V2: over groups of experts that share a device
    communication: float = 0.0  # V2: over the tokens each device receives
    devices: int = 8  # V2: number of device groups D
    device_limit: int = 3  # V2: devices M that a token is sent to at most

    def __post_init__(self) -> None:
        _require_at_least_0(self, "model.moe.balance", "sequence", "device", "communication")
        _require_positive(self, "model.moe.balance", "devices", "device_limit")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture of experts: shared experts, routed experts and the gate that picks them (section 2.1.2)."""

    num_experts: int = 256
    num_shared: int = 1  # shared experts, together one SwiGLU of num_shared * expert_width
    top_k: int = 8  # routed experts per token
    num_groups: int = 8  # experts are grouped by node
    top_groups: int = 4  # groups that a token may use
    expert_width: int = 2048
    # noaux_tc: sigmoid, biased selection, groups by the sum of their best top_k/top_groups (V3); group_limited_greedy:
    # softmax, groups by their best expert (V2); greedy: softmax, no groups (V2-Lite)
    gate: Literal["noaux_tc", "group_limited_greedy", "greedy"] = "noaux_tc"
    normalize_weights: bool = True  # the weights of a token's experts sum to route_scale
    route_scale: float = 2.5
    balance: BalanceConfig = field(default_factory=BalanceConfig)

    def __post_init__(self) -> None:
        place = "model.moe"
        _require_positive(self, place, "num_experts", "top_k", "num_groups", "top_groups", "expert_width")
        _require_at_least_0(self, place, "num_shared")
        experts, groups = self.num_experts, self.num_groups
        _require(experts % groups == 0, f"{place}.num_experts", experts, f"a multiple of num_groups={groups}")
        _require(self.top_groups <= groups, f"{place}.top_groups", self.top_groups, f"at most num_groups={groups}")
        reach = self.top_groups * experts // groups
        where = f"the {reach} experts of top_groups={self.top_groups} of num_groups={groups} groups"
        _require(self.top_k <= reach, f"{place}.top_k", self.top_k, f"at most {where}")
        if self.gate == "greedy":
            _require(groups == 1, f"{place}.num_groups", groups, "1 with gate='greedy', which has no groups")
        if self.gate == "noaux_tc":
            best = self.group_score_size
            wanted = f"groups of at least top_k/top_groups={best} experts (num_experts={experts}, num_groups={groups})"
            _require(experts // groups >= best, f"{place}.num_groups", groups, wanted)
        if self.balance.device or self.balance.communication:
            devices = self.balance.devices
            _require(experts % devices == 0, f"{place}.balance.devices", devices, f"a divisor of num_experts={experts}")

    @property
    def group_score_size(self) -> int:
        """Experts whose scores are summed into their group's: K_r / M, which is 2 in V3 (section 2.1.2)."""
        return max(1, self.top_k // self.top_groups)


@dataclass(frozen=True, kw_only=True)
class MTPConfig:
    """Multi-token prediction (section 2.2)."""

    depth: int = 1  # modules, each predicting one token further; 0: none
    after_final_norm: bool = True  # the main model's hidden state is taken after its final norm

    def __post_init__(self) -> None:
        _require_at_least_0(self, "model.mtp", "depth")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer. Defaults are DeepSeek-V3's 671B."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_layers: int = 61
    num_dense_layers: int = 3  # leading layers with a dense feed-forward network
    dense_width: int = 18432
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)
    norm_eps: float = 1e-6
    init_std: float = 0.006  # of every learnable matrix
    # what the backward pass computes again: nothing; norms, MLA up-projections and SwiGLU (DeepSeek's); whole blocks
    remat: Literal["none", "cheap", "full"] = "cheap"
    unroll: int = 1  # layers in a round of the loop over layers: more is faster on CPU, and slower to compile
    loss_chunk: int = 8192  # columns of the vocabulary whose logits exist at one time
    keep_logits: bool = False  # until the backward pass of the losses, rather than computed again

    def __post_init__(self) -> None:
        _require_positive(self, "model", "vocab_size", "hidden_size", "num_layers", "dense_width", "norm_eps")
        _require_positive(self, "model", "init_std", "unroll", "loss_chunk")
        layers, dense = self.num_layers, self.num_dense_layers
        _require(0 <= dense <= layers, "model.num_dense_layers", dense, f"between 0 and num_layers={layers}")

    @property
    def num_moe_layers(self) -> int:
        """Main layers with a mixture of experts."""
        return self.num_layers - self.num_dense_layers


# settings of how the model is computed: another value gives the same numbers, but for rounding
HOW_COMPUTED = ("model.attention.block", "model.remat", "model.unroll", "model.loss_chunk", "model.keep_logits")


# ---------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One piece of a schedule: the value moves to `value`, which it has when `until` is reached."""

    until: float  # end of the phase, as a share of the run's tokens
    value: float
    shape: Literal["constant", "linear", "cosine"] = "constant"


def _require_phases(phases: tuple[Phase, ...], place: str) -> None:
    _require(len(phases) > 0, place, phases, "at least one phase")
    ends = [phase.until for phase in phases]
    _require(ends == sorted(ends) and ends[0] > 0, place, ends, "phases that end one after the other, above 0")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """What changes in the course of a run, by tokens seen (section 4.2). Defaults are DeepSeek-V3's."""

    tokens: float | None = None  # length of the schedule; None: the length of the run
    warmup_steps: int = 2000  # the learning rate rises linearly from 0
    learning_rate: tuple[Phase, ...] = (  # as a multiple of optimizer.peak_lr
        Phase(until=10 / 14.8, value=1.0),
        Phase(until=14.3 / 14.8, value=0.1, shape="cosine"),
        Phase(until=14.633 / 14.8, value=0.1),
        Phase(until=1.0, value=7.3e-6 / 2.2e-4),
    )
    bias_update_speed: tuple[Phase, ...] = (Phase(until=14.3 / 14.8, value=0.001), Phase(until=1.0, value=0.0))  # gamma
    mtp_weight: tuple[Phase, ...] = (Phase(until=10 / 14.8, value=0.3), Phase(until=1.0, value=0.1))  # lambda
    ramp_start: int | None = None  # sequences per step at the start; None: data.batch_size from the start
    ramp_increment: int = 1536  # sequences by which the batch grows, in equal spans of tokens
    ramp_until: float = 0.0317  # share of the tokens after which the batch has its full size

    def __post_init__(self) -> None:
        _require_positive(self, "schedule", "tokens", "ramp_start", "ramp_increment", "ramp_until")
        _require_at_least_0(self, "schedule", "warmup_steps")
        for name in ("learning_rate", "bias_update_speed", "mtp_weight"):
            _require_phases(getattr(self, name), f"schedule.{name}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with FP32 master weights (section 4.2). Matrices decay; norms, biases and scales do not."""

    peak_lr: float = 2.2e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # decoupled, times the learning rate
    clip_norm: float = 1.0  # of the gradient of all parameters together
    moments: Literal["bf16", "fp32"] = "bf16"
    ema_decay: float | None = None  # of the averaged weights; None: no average is kept

    def __post_init__(self) -> None:
        _require_positive(self, "optimizer", "peak_lr", "eps", "clip_norm")
        _require_at_least_0(self, "optimizer", "weight_decay")
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            _require(value is None or 0 <= value < 1, f"optimizer.{name}", value, "0 or more, below 1")


# ----------------------------------------------------------------------------------------------------------- devices


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices a run has, and what each holds (section 3.2). One length may be -1: all that are left."""

    pipe: int = 1  # stages of the pipeline
    replica: int = 1  # groups of devices; with hsdp each has a whole copy of the training state
    data: int = -1  # shards of the batch and of the training state
    expert: int = 1  # shards of the routed experts, of the batch and of the training state
    expert_nodes: int = 1  # above 1: the devices of `expert` are on so many nodes, and tokens travel in two hops
    # zero1: the training state lies in shards over replica x data x expert, weights are gathered once per step; fsdp:
    # the same shards, gathered layer by layer; hsdp: as fsdp, in shards over data x expert
    sharding: Literal["zero1", "fsdp", "hsdp"] = "zero1"
    gradient_dtype: Literal["fp32", "bf16"] = (
        "fp32"  # in which gradients travel between devices; the head's always in fp32
    )
    exchange_slack: float = 1.25  # slots of the expert exchange, relative to what balanced routing needs

    def __post_init__(self) -> None:
        lengths = {name: getattr(self, name) for name in ("pipe", "replica", "data", "expert")}
        for name, value in lengths.items():
            _require(value > 0 or value == -1, f"mesh.{name}", value, "a number above 0, or -1 for all that are left")
        rest = [name for name, value in lengths.items() if value == -1]
        _require(len(rest) <= 1, f"mesh.{rest[-1] if rest else ''}", -1, f"-1 once, not also for {rest[:1]}")
        _require_positive(self, "mesh", "expert_nodes", "exchange_slack")
        nodes, expert = self.expert_nodes, self.expert
        good = expert == -1 or expert % nodes == 0
        _require(good, "mesh.expert_nodes", nodes, f"a divisor of mesh.expert={expert}")

    @property
    def batch_shards(self) -> int:
        """Devices over which the rows of a batch are spread, once -1 is resolved."""
        return self.replica * self.data * self.expert

    @property
    def shard_axes(self) -> tuple[str, ...]:
        """The mesh axes over which the training state lies in shards."""
        return ("data", "expert") if self.sharding == "hsdp" else ("replica", "data", "expert")

    @property
    def gather_axes(self) -> tuple[str, ...]:
        """Those of `shard_axes` that are longer than 1: over them weights travel."""
        return tuple(axis for axis in self.shard_axes if getattr(self, axis) > 1)

    @property
    def state_shards(self) -> int:
        """Shards of the training state, once -1 is resolved."""
        return math.prod(getattr(self, axis) for axis in self.shard_axes)


ONE_DEVICE = MeshConfig(data=1)


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """The processes of a run. Where Slurm, Open MPI or Kubernetes starts them, none of this is needed."""

    processes: int = 1  # that make up the run; where nothing else has started them, this machine does
    process: int | None = None  # number of this process, from 0; None: as the launcher says
    coordinator: str | None = None  # HOST:PORT at which process 0 listens, and at no other address
    join_seconds: int = 300  # after which a process that is missing ends the run
    restarts: int = 0  # times that a run which this machine starts is started again after a process has died or hung

    def __post_init__(self) -> None:
        _require_positive(self, "launch", "processes", "join_seconds")
        _require_at_least_0(self, "launch", "restarts")
        number, count = self.process, self.processes
        good = number is None or 0 <= number < count
        _require(good, "launch.process", number, f"a number from 0 to {count - 1} (launch.processes={count})")
        address = self.coordinator
        good = address is None or re.fullmatch(r"(\[[^]]+]|[^]:[]+):\d{1,5}", address) is not None
        _require(good, "launch.coordinator", address, "HOST:PORT, or [ADDRESS]:PORT for IPv6")
        wanted = "HOST:PORT of process 0, as there is a launch.process"
        _require(number is None or address is not None, "launch.coordinator", address, wanted)


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """How a step is cut into micro-batches, and in which order the stages of `mesh.pipe` work on them."""

    schedule: Literal["gpipe", "one_f_one_b", "zb1p", "dualpipe", "dualpipe_v"] = "dualpipe"
    # of a full batch; their gradients are accumulated before the optimizer's step. None: as few as the schedule needs
    microbatches: int | None = None
    max_deferred_w: int = 2  # weight gradients that a rank puts off at most; each costs memory
    layers: tuple[int, ...] | None = None  # MoE layers of each stage, first to last; None: as balanced as can be

    def __post_init__(self) -> None:
        _require_positive(self, "pipeline", "microbatches")
        _require_at_least_0(self, "pipeline", "max_deferred_w")
        good = self.layers is None or (len(self.layers) > 0 and min(self.layers) >= 0)
        _require(good, "pipeline.layers", self.layers, "for each stage a number that is 0 or more")

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of a full batch, once None is resolved."""
        return self.microbatches or 1

    def least_microbatches(self, pipe: int) -> int:
        """As few micro-batches as the schedule can do with."""
        return 1 if pipe == 1 else 2 * pipe if self.schedule in ("dualpipe", "dualpipe_v") else pipe


# -------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text, its tokens, and how they make a batch (section 4.1)."""

    train: tuple[str, ...] = ()  # files, folders or globs (text, .jsonl, .parquet), each one source of the mix
    weights: tuple[float, ...] = ()  # share of each source of train in the mix, by tokens; none: all documents alike
    valid: tuple[str, ...] = ()  # validation text; none: valid_fraction of the training documents
    valid_fraction: float = 0.01  # share of documents kept out of training; equal documents are on the same side
    exclude: tuple[str, ...] = ()  # files whose path has one of these names as a folder or file are left out
    text_field: str = "text"  # of a JSONL object or a Parquet row
    bad_line: Literal["error", "skip"] = "error"  # what a JSONL line that cannot be read does
    tokenizer: str = "bytes"  # "bytes", or the path of a tokenizer.json
    cache: str | None = None  # folder of the token files; None: `tokens` beside the run folder
    sequence_length: int = 4096  # tokens per row that are predicted
    batch_size: int = 15360  # rows per step
    virtual_shards: int = 8  # fixed parts of the data, each with its own packer; hosts share them out
    mask_documents: bool = False  # attention stays within a document
    fim_rate: float = 0.1  # share of documents in prefix-suffix-middle order

    def __post_init__(self) -> None:
        _require_positive(self, "data", "sequence_length", "batch_size", "virtual_shards")
        for name in ("valid_fraction", "fim_rate"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"data.{name}", value, "0 or more, below 1")
        batch, shards = self.batch_size, self.virtual_shards
        _require(batch % shards == 0, "data.virtual_shards", shards, f"a divisor of batch_size={batch}")
        sources = len(self.train)
        if self.weights:
            good = len(self.weights) == sources and min(self.weights) > 0
            wanted = f"one number above 0 for each of the {sources} sources of data.train"
            _require(good, "data.weights", self.weights, wanted)


# ----------------------------------------------------------------------------------------------------------- the run


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of a run is saved besides its end, what is kept, and how it is checked."""

    every_steps: int | None = None  # None: not by steps
    every_minutes: float | None = 30.0  # since the save before, or the start; None: not by time
    keep: int = 3  # newest checkpoints that are kept
    keep_every: int | None = None  # those of steps that are multiples of it are kept for ever
    keep_best: bool = True  # the one with the lowest validation loss is kept
    verify: float = 1.0  # part of the bytes that is read before a run goes on; names and sizes are always checked
    # folder on a faster disk that all processes share, such as one machine's own: the newest state is saved there too
    local: str | None = None
    local_minutes: float = 5.0  # between two saves there
    remote: str | None = None  # address to which checkpoints are copied, e.g. s3://bucket/run; None: none
    remote_keep: int | None = 3  # newest copies that are kept there; None: all

    def __post_init__(self) -> None:
        _require_positive(self, "checkpoint", "every_steps", "every_minutes", "keep", "keep_every", "remote_keep")
        _require_positive(self, "checkpoint", "local_minutes")
        _require(0 <= self.verify <= 1, "checkpoint.verify", self.verify, "0 or more, at most 1")


@dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """What a run does about numbers that are not finite, and about spikes of the loss.

    A step whose loss or gradient is not finite is not applied, and is repeated once from the same data. If it is
    finite then, the machine was at fault.
    """

    max_bad_steps: int = 3  # in a row, not finite when repeated either; then the run rolls back, or ends: exit code 10
    max_machine_faults: int = 3  # steps that were finite when repeated; then the run ends: exit code 13
    on_spike: Literal["warn", "roll_back"] = "warn"  # where that is not possible, the run ends: exit code 14
    spike_z: float | None = 6.0  # a loss so many standard deviations above the mean is a spike; None: none is
    spike_window: int = 100  # steps of which that mean is
    roll_backs: int = 2  # times that a run, until it is started again, goes back to its newest whole checkpoint
    skip_batches: bool = True  # after going back it leaves the batches out that came since that checkpoint

    def __post_init__(self) -> None:
        _require_positive(self, "faults", "max_bad_steps", "max_machine_faults", "spike_z")
        _require_at_least_0(self, "faults", "roll_backs")
        _require(self.spike_window > 1, "faults.spike_window", self.spike_window, "2 or more")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run writes, and how often."""

    valid_every: int = 100  # steps
    valid_batches: int = 8  # batches of a validation; they are the same every time
    pictures_every: int = 100  # steps
    console_seconds: float = 1.0  # least time between two lines on the console
    tensorboard: bool = True
    wandb: str | None = None  # project on Weights & Biases; None: not used
    prompt: str = ""  # start of the sample text that is printed at the end
    sample_tokens: int = 200  # length of that sample; 0: none
    peak_flops: float | None = None  # FLOP/s that MFU is relative to; None: the device's own, or measured on CPU

    def __post_init__(self) -> None:
        _require_positive(self, "log", "valid_every", "valid_batches", "pictures_every", "peak_flops")
        _require_at_least_0(self, "log", "console_seconds", "sample_tokens")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. Either `steps` or `schedule.tokens` says how long it is."""

    name: str = "run"
    out: str | None = None  # the run folder; None: runs/<name>
    steps: int | None = None  # optimizer steps; None: until schedule.tokens
    seed: int = 0
    # run folder, or its checkpoints/<step>, with whose weights and router biases a new run starts; None: they are drawn
    resume_from: str | None = None
    resume_optimizer: bool = False  # with the optimizer's moments of that run, too
    # of the compute; master weights are FP32. fp8: E4M3 in tiles in the linear layers of all blocks, else BF16
    precision: Precision = "bf16"
    # a step that takes longer ends the run with exit code 11; compiling, restoring, validating, saving and drawing may
    # take 4 times as long. None: no limit
    hang_seconds: float | None = 1800.0
    compiled: str | None = None  # folder of compiled programs; None: `compiled` beside the run folder
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    simulate: int | None = None  # CPU devices to simulate, over all processes; None: the machine's own devices
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        _require_positive(self, "", "steps", "hang_seconds", "simulate")
        if self.simulate is not None:
            wanted = f"a multiple of launch.processes={self.launch.processes}"
            _require(self.simulate % self.launch.processes == 0, "simulate", self.simulate, wanted)
        both = self.steps is None and self.schedule.tokens is None
        _require(not both, "steps", self.steps, "a number, or a number for schedule.tokens")
        batch, micro, shards = self.data.batch_size, self.pipeline.num_microbatches, self.data.virtual_shards
        _require(batch % micro == 0, "pipeline.microbatches", micro, f"a divisor of data.batch_size={batch}")
        start, increment = self.schedule.ramp_start, self.schedule.ramp_increment
        if start is not None:
            _require(start <= batch, "schedule.ramp_start", start, f"at most data.batch_size={batch}")
            unit = math.lcm(batch // micro, shards)
            wanted = f"a multiple of {unit} (a micro-batch has {batch // micro} rows, data.virtual_shards={shards})"
            _require(start % unit == 0, "schedule.ramp_start", start, wanted)
            _require(increment % unit == 0, "schedule.ramp_increment", increment, wanted)

    @property
    def folder(self) -> str:
        """The run folder."""
        return self.out if self.out is not None else f"runs/{self.name}"

    @property
    def rows_of_microbatch(self) -> int:
        """Sequences of a micro-batch, over all devices."""
        return self.data.batch_size // self.pipeline.num_microbatches

    def to_json(self) -> str:
        """The whole tree as JSON text; `from_json` of it is equal to the tree."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunConfig":
        """The tree of `to_json`. Fields that the text leaves out have their defaults.

        Raises:
            ConfigError: unknown fields, wrong types, values that do not fit.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError("config", f"line {error.lineno}", f"JSON ({error.msg})") from None
        return _build(cls, values, "")


def _build(kind: Any, value: Any, place: str) -> Any:
    """`value` (of JSON) as an object of the type `kind`; `place` is its path in the tree."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        _require(isinstance(value, dict), place or "config", value, "an object of settings")
        hints = typing.get_type_hints(kind)
        prefix = f"{place}." if place else ""
        for name in value:
            _require(name in hints, f"{prefix}{name}", value[name], f"one of the fields {', '.join(hints)}")
        return kind(**{name: _build(hints[name], item, f"{prefix}{name}") for name, item in value.items()})
    if origin is tuple:
        _require(isinstance(value, list), place, value, "a list")
        return tuple(_build(arguments[0], item, f"{place}[{index}]") for index, item in enumerate(value))
    if origin is types.UnionType:
        if value is None and type(None) in arguments:
            return None
        return _build(next(a for a in arguments if a is not type(None)), value, place)
    if origin is Literal:
        _require(value in arguments, place, value, f"one of {', '.join(map(repr, arguments))}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    exact = type(value) is kind
    _require(exact, place, value, {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind])
    return value
