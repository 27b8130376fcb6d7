"""What a device and its network can do: peaks of data sheets, and the shares of them that are reached in practice.

A hardware file is JSON (`chips/*.json`; SI units: bytes, FLOP/s, bytes/s). A file of one's own may name another with
`like` and say only what differs. The `hardware.json` that `tools/gpu_check.py` writes is taken too. No number is fitted
to the training time of a published run: shares come from benchmarks of single operations, and each file says which.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moejax.config import ConfigError

CHIPS = Path(__file__).parent / "chips"

# Kinds of work. Of products the number is a share of the peak FLOP/s of the dtype; of memory, of its bandwidth.
KINDS = (
    *("dense_fp8", "dense_bf16"),  # forward and input gradients of dense layers
    *("grouped_fp8", "grouped_bf16"),  # of routed experts
    *("outer_fp8", "outer_bf16"),  # weight gradients
    *("attention", "attention_backward"),  # BF16, the causal half counted
    "fp32",  # products in FP32: the router
    "memory",  # everything whose time is its reading and writing
)


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A device, its node and its network."""

    name: str
    memory: float  # bytes of a device
    memory_bandwidth: float  # bytes/s, data sheet
    bf16: float  # FLOP/s, dense, data sheet
    fp8: float
    fp32: float
    sms: int  # streaming multiprocessors
    communication_sms: int  # those that an all-to-all takes from the products beside it
    devices_per_node: int
    intra_node: float  # bytes/s of a device each way that are usable inside a node
    inter_node: float  # and between nodes
    storage: float  # bytes/s of a node to the storage of checkpoints
    dollars_per_hour: float  # of a device
    efficiency: Mapping[str, float]  # by KINDS
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in self.__annotations__.items():
            value = getattr(self, name)
            if kind in (int, float) and not (isinstance(value, int | float) and value > 0):
                raise ConfigError(f"hardware.{name}", value, "a number above 0")
        for name, share in self.efficiency.items():
            if not (isinstance(share, int | float) and 0 < share <= 1):
                raise ConfigError(f"hardware.efficiency.{name}", share, "a share, above 0, at most 1")
        missing = [kind for kind in KINDS if kind not in self.efficiency]
        if missing:
            raise ConfigError("hardware.efficiency", missing[0], f"a share for each of {', '.join(KINDS)}")

    def peak(self, kind: str) -> float:
        """FLOP/s of the data sheet in the dtype of a kind of products."""
        return self.fp8 if kind.endswith("fp8") else self.fp32 if kind == "fp32" else self.bf16

    def seconds(self, kind: str, flops: float, num_bytes: float, sms: int = 0) -> float:
        """Time of work of one of KINDS while communication takes `sms`, which slows down products alone."""
        if kind == "memory":
            return num_bytes / (self.memory_bandwidth * self.efficiency[kind])
        return flops / (self.peak(kind) * self.efficiency[kind]) * self.sms / (self.sms - sms)


def load_hardware(name: str) -> Hardware:
    """The hardware of a name (h800, h100, h200, b200) or of a JSON file.

    Raises:
        ConfigError: there is no such hardware, or the file does not say what is needed.
    """
    values = _read(name)
    names = [f.name for f in dataclasses.fields(Hardware)]
    for place in values:
        if place not in names:
            raise ConfigError(f"hardware.{place}", values[place], f"one of {', '.join(names)}, like")
    missing = [name for name in names if name not in values and name != "sources"]
    if missing:
        raise ConfigError(f"hardware.{missing[0]}", None, f"a value, or like: one of {', '.join(known())}")
    return Hardware(**values)


def known() -> list[str]:
    """The names of the hardware that is here."""
    return sorted(path.stem for path in CHIPS.glob("*.json"))


def _read(name: str) -> dict[str, Any]:
    """The values of a file, on top of those of the file that it is like."""
    path = CHIPS / f"{name}.json" if name in known() else Path(name)
    if not path.is_file():
        raise ConfigError("hardware", name, f"one of {', '.join(known())}, or a JSON file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError("hardware", name, f"JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError("hardware", name, "an object of numbers")
    if "bf16_flops" in values:
        values = _measured(values)
    like = values.pop("like", None)
    if like is None:
        return values
    if like not in known():
        raise ConfigError("hardware.like", like, f"one of {', '.join(known())}")
    base = _read(like)
    merged = {part: {**base.get(part, {}), **values.get(part, {})} for part in ("efficiency", "sources")}
    return {**base, **values, **merged}


def _measured(values: dict[str, Any]) -> dict[str, Any]:
    """What `tools/gpu_check.py` has measured, as shares of the data sheet's peaks of that device."""
    like = next((name for name in known() if name.upper() in str(values.get("device", "")).upper()), None)
    if like is None:
        raise ConfigError("hardware.device", values.get("device"), f"a device among {', '.join(known())}")
    sheet, found = load_hardware(like), values.get("efficiency", {})
    ceilings = {"bf16": values["bf16_flops"] / sheet.bf16, "fp8": (values.get("fp8_flops") or 0) / sheet.fp8}
    shares = {f"dense_{dtype}": share for dtype, share in ceilings.items() if share}
    for kind, names in (("grouped", ("grouped_forward", "grouped_dx")), ("outer", ("grouped_dw",))):
        for dtype, ceiling in ceilings.items():
            own = [found[name][dtype] for name in names if dtype in found.get(name, {})]
            shares |= {f"{kind}_{dtype}": ceiling * sum(own) / len(own)} if own else {}
    for kind, name in (("attention", "attention_forward"), ("attention_backward", "attention_backward")):
        shares |= {kind: ceilings["bf16"] * found[name]["bf16"]} if "bf16" in found.get(name, {}) else {}
    if "bytes" in found.get("memory_bound", {}):
        copy = values["copy_bytes_per_second"] / sheet.memory_bandwidth
        shares["memory"] = copy * found["memory_bound"]["bytes"]
    measured = dict.fromkeys(shares, "measured by tools/gpu_check.py")
    return {"like": like, "memory": values["memory_bytes"], "efficiency": shares, "sources": measured}
