"""What prune did: the certificate, the fate of every channel, sizes before and after."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prifu_plugin.figures import new_figure
from prifu_plugin.formats import FORMAT, check_format, reading
from prifu_plugin.graph.undisturbed import undisturbed
from prifu_plugin.names import is_of_filter
from prifu_plugin.prune.facts import Fact, channels_of
from prifu_plugin.prune.inputs import Inputs
from prifu_plugin.prune.plan import Plan
from prifu_plugin.prune.rules.base import Analysis
from prifu_plugin.prune.rules.linear import LinearRule
from prifu_plugin.prune.rules.norm import ChannelAffineRule, StatisticsRule
from prifu_plugin.prune.verify import Check


@dataclass(frozen=True)
class Fate:
    """What became of the channels one layer puts out.

    Attributes:
        path: module path, or node name for a functional call.
        type: class name.
        channels: before.
        needed: kept, since they are live and needed.
        constant: kept although constant, since a reader asked: a carrier for a padded
            convolution, the feed of a depthwise one, alignment, or a tensor's shape.
        whole: kept although dead, since an operation without a rule needs them whole.
    """

    path: str
    type: str
    channels: int
    needed: int
    constant: int
    whole: int

    @property
    def removed(self) -> int:
        """Channels that are gone."""
        return self.channels - self.needed - self.constant - self.whole


@dataclass(frozen=True)
class PruneReport:
    """The result of `prifu_plugin.prune`, as data.

    Attributes:
        checks: the certificate: each comparison with the filtered model.
        seed: of its inputs.
        layers: fate of the channels, layer by layer.
        notes: (node or module, reason): what was left whole and why, and what the result does not
            have any more, such as hooks and functional dropout.
        parameters: before (filters not counted), after.
        macs: multiply-accumulates for one input, before and after.
        bytes: of parameters and buffers, before and after.
        way: how the forward was followed: as a "graph" by torch.fx, with the "sizes" of the example
            where it decides on those, or in "parts" inside its own Python.

    Example:
        >>> PruneReport((), 0, (), (), (10, 5), (100, 30), (40, 20)).saved
        0.7
    """

    checks: tuple[Check, ...]
    seed: int
    layers: tuple[Fate, ...]
    notes: tuple[tuple[str, str], ...]
    parameters: tuple[int, int]
    macs: tuple[int, int]
    bytes: tuple[int, int]
    way: str = "graph"

    @property
    def saved(self) -> float:
        """Share of the multiply-accumulates that is gone."""
        return 1 - self.macs[1] / self.macs[0] if self.macs[0] else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dict that JSON can hold."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PruneReport:
        """Read what `to_dict` wrote, before or after JSON; ConfigError for anything else."""
        with reading("report of prune"):
            check_format(data, "report of prune")
            return cls(
                tuple(_check_of(check) for check in data["checks"]),
                data["seed"],
                tuple(Fate(**fate) for fate in data["layers"]),
                tuple((node, reason) for node, reason in data["notes"]),
                tuple(data["parameters"]),
                tuple(data["macs"]),
                tuple(data["bytes"]),
                data.get("way", "graph"),
            )

    def plot(self, axes: Any = None) -> tuple[Any, Any]:
        """Draw how many channels each convolution and linear layer keeps.

        Args:
            axes: matplotlib axes to draw on; None makes a new figure.

        Returns:
            The figure and its axes.

        Raises:
            ImportError: if matplotlib is missing.
        """
        if axes is None:
            axes = new_figure(9, 3.5).subplots()
        layers = [f for f in self.layers if "linear" in f.type.lower() or "Conv" in f.type]
        places = list(range(len(layers)))
        kept = [fate.channels - fate.removed for fate in layers]
        axes.bar(places, [fate.channels for fate in layers], color="#d8dee9", label="before")
        axes.bar(places, kept, color="#2e6f95", label="kept")
        for place, count in zip(places, kept, strict=True):
            axes.annotate(str(count), (place, count), ha="center", va="bottom", fontsize=6)
        paths = [fate.path for fate in layers]
        axes.set_xticks(places, paths, rotation=60, ha="right", fontsize=7)
        axes.set(ylabel="channels", title="Channels kept, layer by layer")
        axes.legend(frameon=False)
        return axes.figure, axes

    def __str__(self) -> str:
        lines = [
            f"parameters {self.parameters[0]:,} -> {self.parameters[1]:,}, multiply-accumulates "
            f"{self.macs[0]:,} -> {self.macs[1]:,}, bytes {self.bytes[0]:,} -> {self.bytes[1]:,}"
        ]
        lines += [
            f"exact: {c.dtype} {list(c.shapes)} differs by {c.difference:.1e} of {c.tolerance:.0e}"
            for c in self.checks
        ]
        lines += [f"note: {node}: {reason}" for node, reason in self.notes]
        return "\n".join(lines)


def _check_of(data: dict[str, Any]) -> Check:
    return Check(**{**data, "shapes": tuple(map(tuple, data["shapes"]))})


def fates(analysis: Analysis, plan: Plan) -> tuple[Fate, ...]:
    """Return the fate of every layer's channels."""
    layouts = {node.name: dict(node.layout) for node in plan.nodes}
    found = []
    for node, rule in analysis.rules.items():
        if not isinstance(rule, LinearRule | ChannelAffineRule | StatisticsRule):
            continue
        fact = analysis.fact(node)
        dim = (rule.map.dim if isinstance(rule, LinearRule) else rule.dim) % len(fact.shape)
        module = node.op == "call_module"
        found.append(
            _fate(
                str(node.target) if module else node.name,
                type(analysis.module(node)).__name__ if module else "linear",
                fact,
                channels_of(analysis.wanted(node), dim),
                channels_of(analysis.keep[node], dim),
                layouts.get(node.name),
                dim,
            )
        )
    return tuple(found)


def count_macs(model: nn.Module, inputs: Inputs) -> int:
    """Return the multiply-accumulates of one forward pass at batch 1."""
    try:
        return _count_macs(model, inputs.batch(1))
    except Exception:  # noqa: BLE001 - it takes no batch of 1
        return _count_macs(model, inputs)


def _count_macs(model: nn.Module, inputs: Inputs) -> int:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its fused kernel is not counted
    # The counter hooks gradients of what modules are given, and trips over bare parameters.
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        # Fused attention is not counted; which kernel torch takes depends on the widths.
        with (
            undisturbed(model),
            torch.no_grad(),
            _recurrent_layers_apart(model),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            model(*inputs.draw(model, 0))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter in trained:
            parameter.requires_grad_(True)
    return int(counter.get_total_flops()) // 2 // inputs.shapes[0][0]


@contextmanager
def _recurrent_layers_apart(model: nn.Module) -> Iterator[None]:
    """Let LSTM and kin run step by step, since their fused kernels are not counted."""
    kernels: Any = torch.backends.mkldnn
    before = kernels.enabled
    kernels.enabled = before and not any(isinstance(m, nn.RNNBase) for m in model.modules())
    try:
        yield
    finally:
        kernels.enabled = before


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, filters not counted."""
    return sum(p.numel() for name, p in model.named_parameters() if not is_of_filter(name))


def count_bytes(model: nn.Module) -> int:
    """Return the bytes of parameters and buffers, filters not counted."""
    return sum(
        value.numel() * value.element_size()
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and not is_of_filter(name)
    )


def _fate(
    path: str,
    kind: str,
    fact: Fact,
    wanted: Tensor,
    keep: Tensor,
    layout: dict[int, tuple[int, ...]] | None,
    dim: int,
) -> Fate:
    size = fact.shape[dim]
    kept = torch.zeros(size, dtype=torch.bool)
    if layout is not None:
        kept[list(layout.get(dim, range(size)))] = True
    wanted, keep = wanted.expand(size), keep.expand(size)
    needed = int((kept & wanted).sum())
    constant = int((kept & keep & ~wanted).sum())
    return Fate(path, kind, size, needed, constant, int(kept.sum()) - needed - constant)
