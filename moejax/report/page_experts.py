"""The report's section on the experts: balance, entropy and bias over the steps, and heat maps of every expert.

S steps, R records of the load, L MoE layers (main, then MTP), E experts.
"""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from moejax.report.axes import reduced, short
from moejax.report.heat import (
    LOAD,
    amount_palette,
    heat_map,
    load_levels,
    signed_levels,
    signed_palette,
)
from moejax.report.page_training import Along, grid, layers_over_steps, over_steps
from moejax.report.records import Loads, Records
from moejax.train.balance import load_entropy

COLUMNS = 240  # of a heat map over the steps, at most
PIXELS = 1_000_000  # of all heat maps of single layers together, at most
LISTED = 12  # layers whose idle experts are named


def experts(runs: Sequence[Records]) -> str:
    """The section; an empty string where no run has experts."""
    along = Along(runs)
    figures = [
        layers_over_steps(runs, along, "Violation of balance", "(fullest expert - mean) / mean", _violation, zero=True),
        over_steps(runs, along, "Dead experts", "without a token in a step, all layers", "dead_experts", zero=True),
        layers_over_steps(
            runs,
            along,
            "Routing entropy",
            "nats, of the experts' shares of a layer's tokens",
            _entropy,
            lines=[(math.log(count), f"balanced, {count} experts") for count in sorted(_counts(runs))],
        ),
        layers_over_steps(
            runs,
            along,
            "Range of the router's bias",
            "greatest - least of a layer",
            _bias_range,
            zero=True,
        ),
        layers_over_steps(
            runs,
            along,
            "Drift of the router's bias",
            "net movement, share of the greatest possible",
            _bias_drift,
            zero=True,
            note="1: each step moved every bias the same way; near 0: to and fro, as in balance",
        ),
    ]
    if len(runs) == 1:
        return grid([*figures, *_maps(runs[0])]) + _single_layers(runs[0])
    parts = [grid(figures)]
    for run in runs:
        maps = grid(_maps(run)) + _single_layers(run)
        if maps:
            opened = " open" if len(runs) <= 3 else ""
            parts.append(f"<details{opened}><summary>Heat maps of {escape(run.name)}</summary>{maps}</details>")
    return "".join(parts)


# ------------------------------------------------------------------------------------------- of each layer, in numbers


def _violation(run: Records) -> tuple[np.ndarray, np.ndarray]:
    return run.step, run.by_layer("max_violation")


def _entropy(run: Records) -> tuple[np.ndarray, np.ndarray]:
    recorded = run.by_layer("load_entropy")
    if recorded.size or run.loads is None:
        return run.step, recorded
    loads = run.loads  # an older run: from the records that there are
    return loads.step, np.stack([load_entropy(load_LE) for load_LE in loads.load])


def _bias_range(run: Records) -> tuple[np.ndarray, np.ndarray]:
    if run.loads is None or run.loads.bias is None:
        return np.zeros(0), np.zeros((0, 0))
    return run.loads.step, run.loads.bias.max(-1) - run.loads.bias.min(-1)


def _bias_drift(run: Records) -> tuple[np.ndarray, np.ndarray]:
    """How far the biases moved from record to record, of what the update speed of the steps between allows."""
    if run.loads is None or run.loads.bias is None or len(run.loads.step) < 2:
        return np.zeros(0), np.zeros((0, 0))
    moved_RL = np.abs(np.diff(run.loads.bias, axis=0)).mean(-1)
    reach = np.interp(run.loads.step, run.step, np.cumsum(np.nan_to_num(run.column("bias_update_speed"))))
    reach_R = np.diff(reach) if len(run.step) else np.zeros(len(moved_RL))
    with np.errstate(divide="ignore", invalid="ignore"):
        return run.loads.step[1:], np.where(reach_R[:, None] > 0, moved_RL / reach_R[:, None], np.nan)


def _counts(runs: Sequence[Records]) -> set[int]:
    """How many experts a layer has, in each of the runs."""
    found = {run.loads.load.shape[-1] for run in runs if run.loads is not None}
    return found | {
        run.config.model.moe.num_experts for run in runs if run.config and run.by_layer("load_entropy").size
    }


# ----------------------------------------------------------------------------------------------------------- heat maps


def _maps(run: Records) -> list[str]:
    violation, loads = run.by_layer("max_violation"), run.loads
    figures = [_violation_map(run, violation)] if violation.size and np.isfinite(violation).any() else []
    if loads is not None:
        figures.append(_load_map(run, loads))
        if loads.bias is not None and np.isfinite(loads.bias[-1]).any():
            figures.append(_bias_map(run, loads, loads.bias[-1]))
    return figures


def _violation_map(run: Records, violation_SL: np.ndarray) -> str:
    values = reduced(violation_SL, COLUMNS, np.fmax)
    usual = max(float(np.nanquantile(values, 0.98)), 0.1)
    digit = 10.0 ** math.floor(math.log10(usual))
    most = digit * math.ceil(usual / digit - 1e-6)  # round: it is in the legend
    palette = amount_palette(most)
    names = layer_names(run, values.shape[1])
    words = []
    for layer, name in enumerate(names):
        own = violation_SL[:, layer]
        if np.isfinite(own).any():
            worst = int(np.nanargmax(own))
            now = short(float(own[-1]))
            words.append(
                f"{_layer(name)}: {now} at the end, at most {short(float(own[worst]))} at step {run.step[worst]:,}"
            )
        else:
            words.append(f"{_layer(name)}: no number")
    return heat_map(
        "Fullest expert of each layer",
        "(tokens - mean) / mean",
        signed_levels(values.T, most),
        palette,
        rows=names,
        columns=reduced(run.step, COLUMNS, np.minimum),
        row_name="layer",
        column_name="step",
        words=words,
        note="" if len(run.step) <= COLUMNS else "Each column is the worst of several steps",
    )


def _load_map(run: Records, loads: Loads) -> str:
    load_LE, step = loads.load[-1], int(loads.step[-1])
    names = layer_names(run, len(load_LE))
    words, idle = [], []
    for name, load_E in zip(names, load_LE, strict=True):
        most, least = int(load_E.argmax()), int(load_E.argmin())
        extremes = f"expert {most} has {load_E[most]:.2f} times the mean, expert {least} {load_E[least]:.2f} times"
        words.append(f"{_layer(name)}: {extremes}")
        none = np.flatnonzero(load_E == 0)
        if len(none):
            shown = ", ".join(map(str, none[:8])) + (f" and {len(none) - 8} more" if len(none) > 8 else "")
            idle.append(f"{_layer(name)}: {shown}")
    more = f"; and in {len(idle) - LISTED} more layers" if len(idle) > LISTED else ""
    note = f"Without a token: {'; '.join(idle[:LISTED])}{more}" if idle else "Every expert had tokens in this step"
    return heat_map(
        f"Load of every expert at step {step:,}",
        "tokens / mean of the layer",
        load_levels(load_LE),
        LOAD,
        rows=names,
        columns=np.arange(load_LE.shape[1]),
        row_name="layer",
        column_name="expert",
        words=words,
        note=note + ("; lines part the groups" if _groups(run, load_LE.shape[1]) else ""),
        dividers=_groups(run, load_LE.shape[1]),
    )


def _bias_map(run: Records, loads: Loads, bias_LE: np.ndarray) -> str:
    most = float(np.nanmax(np.abs(bias_LE))) or 1.0
    names = layer_names(run, len(bias_LE))
    return heat_map(
        f"Bias of the router at step {int(loads.step[-1]):,}",
        "added to the expert's score",
        signed_levels(bias_LE, most),
        signed_palette(most),
        rows=names,
        columns=np.arange(bias_LE.shape[1]),
        row_name="layer",
        column_name="expert",
        words=[
            f"{_layer(name)}: from {short(float(bias_E.min()))} to {short(float(bias_E.max()))}"
            for name, bias_E in zip(names, bias_LE, strict=True)
        ],
        note="Above 0: the expert had too few tokens, and is now chosen more often",
        dividers=_groups(run, bias_LE.shape[1]),
    )


def _single_layers(run: Records) -> str:
    """Every layer's experts over the records, closed until asked for; empty where there are no two records."""
    loads = run.loads
    if loads is None or len(loads.step) < 2:
        return ""
    _, layers, count = loads.load.shape
    most = max(2, min(COLUMNS, PIXELS // (layers * count)))
    picked = np.unique(np.linspace(0, len(loads.step) - 1, most).round().astype(int))
    figures = [
        heat_map(
            _layer(name).replace("layer", "Layer"),
            "",
            load_levels(loads.load[picked, layer].T),
            LOAD,
            rows=[str(expert) for expert in range(count)],
            columns=loads.step[picked],
            row_name="expert",
            column_name="step",
            small=True,
        )
        for layer, name in enumerate(layer_names(run, layers))
    ]
    words = f"Load of each layer's experts over the steps ({layers} heat maps, colours as above)"
    return f'<details><summary>{words}</summary><div class="grid small">{"".join(figures)}</div></details>'


def layer_names(run: Records, count: int) -> list[str]:
    """The names of the MoE layers: their numbers in the model, and those of the MTP modules."""
    if run.config is None or count != run.config.model.num_moe_layers + run.config.model.mtp.depth:
        return [str(layer) for layer in range(count)]
    model = run.config.model
    own = [str(layer) for layer in range(model.num_dense_layers, model.num_layers)]
    return own + [f"MTP {depth}" for depth in range(1, model.mtp.depth + 1)]


def _layer(name: str) -> str:
    return name if name.startswith("MTP") else f"layer {name}"


def _groups(run: Records, count: int) -> range:
    """The experts with which a group begins, but the first."""
    moe = run.config.model.moe if run.config else None
    if moe is None or moe.num_groups < 2 or moe.num_experts != count:
        return range(0)
    return range(count // moe.num_groups, count, count // moe.num_groups)
