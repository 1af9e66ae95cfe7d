"""Linear maps: Linear, convolutions of any dimension and grouping, F.linear with parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from prifu_plugin.prune.facts import Fact, any_over, summarize
from prifu_plugin.prune.layout import FILL, box
from prifu_plugin.prune.plan import SliceLinear
from prifu_plugin.prune.planner import Planner
from prifu_plugin.prune.rules.base import Analysis, Rule


@dataclass(frozen=True)
class LinearMap:
    """A linear map along one dimension, without its spatial part.

    Attributes:
        weight: kernel summed over space, (groups, out per group, in per group).
        connected: whether any tap is not 0, same shape.
        bias: (out,), zeros if there is none.
        dim: the dimension it maps, in the input's shape.
        padded: zeros are padded around the input, so that a constant is cut off at the border.
        mappable: a two-dimensional convolution whose padding is given in numbers.
    """

    weight: Tensor
    connected: Tensor
    bias: Tensor
    dim: int
    padded: bool
    mappable: bool = False

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.weight.shape[0]

    @property
    def outputs(self) -> int:
        """Output channels per group."""
        return self.weight.shape[1]

    @property
    def inputs(self) -> int:
        """Input channels per group."""
        return self.weight.shape[2]


NARROW = 48
"""Live input channels below which a border map is preferred to a carrier."""


class LinearRule(Rule):
    """A linear map at one node."""

    def __init__(self, node: fx.Node, linear: LinearMap) -> None:
        super().__init__(node)
        self.map = linear
        self.source = node.args[0]
        assert isinstance(self.source, fx.Node)

    def adds_border(self, analysis: Analysis) -> bool:
        """Whether missing constants at a border are added as a map, rather than carried.

        A carrier is one more channel to compute, here and where it comes from; a map is one more
        pass over the result. Narrow and grouped convolutions are better off with the map.
        """
        if not self.map.mappable or self.map.inputs == 1:
            return False
        live = self._line(analysis.fact(self.source).live)
        return self.map.groups > 1 or int(live.sum()) < NARROW

    def const(self, analysis: Analysis) -> Fact:
        """Map constants; live if a live input is connected, or a constant meets the border."""
        fact, linear = analysis.fact(self.source), self.map
        known, live = self._grouped(fact.known, fact), self._grouped(fact.live, fact)
        connected = linear.connected.double()
        out = torch.einsum("...gi,goi->...go", known, linear.weight).flatten(-2) + linear.bias
        reached = torch.einsum("...gi,goi->...go", live.double(), connected) > 0
        if linear.padded:
            reached |= torch.einsum("...gi,goi->...go", (known != 0).double(), connected) > 0
        out = torch.where(reached.flatten(-2), torch.nan, out).movedim(-1, linear.dim)
        shape = tuple(
            linear.groups * linear.outputs if d == linear.dim else size
            for d, size in enumerate(_output_shape(analysis, self.node))
        )
        return summarize(out, shape, tuple(sorted({*fact.axes, linear.dim})))

    def need(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Need every input that is connected to a needed, live result."""
        wanted = analysis.wanted(self.node)
        return {self.source: any_over(self._reached_inputs(wanted), analysis.fact(self.source))}

    def want(self, analysis: Analysis) -> dict[fx.Node, Tensor]:
        """Want one constant channel per group to exist if constants meet a zero-padded border."""
        fact, linear = analysis.fact(self.source), self.map
        want = torch.zeros(fact.summary_shape(), dtype=torch.bool)
        if not linear.padded or linear.dim not in fact.axes or self.adds_border(analysis):
            return {}
        asked = analysis.wants.get(self.source, want)
        asked = self._line(asked)
        size = self._line(fact.known).abs()
        for offset, indices in self._border_constants(analysis):
            # One that exists already for another reader costs nothing.
            carrier = max(indices, key=lambda i: (bool(asked[offset + i]), float(size[offset + i])))
            want.select(linear.dim, offset + carrier).fill_(True)
        return {self.source: want}

    def aligned_dim(self, source: fx.Node) -> int | None:
        """Dense linear maps like aligned widths."""
        return self.map.dim if self.map.groups == 1 else None

    def plan(self, planner: Planner) -> None:
        """Slice rows to what is kept and columns to what exists."""
        analysis, linear = planner.analysis, self.map
        keep = analysis.keep[self.node]
        if not keep.any():
            return
        kept = box(keep, analysis.fact(self.node).axes)
        rows = kept.pop(linear.dim)
        if linear.groups == 1:
            self._plan_dense(planner, rows, kept)
        else:
            self._plan_grouped(planner, rows, kept)

    def _plan_dense(
        self, planner: Planner, rows: tuple[int, ...], others: dict[int, tuple[int, ...]]
    ) -> None:
        analysis, linear = planner.analysis, self.map
        fact = analysis.fact(self.source)
        columns = (
            planner.physical(self.source, linear.dim)
            if planner.exists(self.source)
            else tuple(range(linear.inputs))
        )
        missing = [i for i in range(linear.inputs) if i not in set(columns)]
        if not self._uniform(fact, missing):
            columns, missing = tuple(range(linear.inputs)), []
        zero_rows = self._constant_rows(analysis, rows)
        name = self.node.name
        bias = delta = border_map = ""
        if missing or zero_rows:
            bias = planner.constant(f"{name}__bias", self._bias(analysis, rows, missing, zero_rows))
        border = self._border(fact, missing)
        if border and self.adds_border(analysis):
            border_map = self._border_map(planner, rows, [border])
        elif border:
            delta = self._carry(planner, rows, [columns], [border])
        target = {**others, linear.dim: columns}
        kernel = SliceLinear(rows, (columns,), 1, zero_rows, bias, delta, border_map)
        conform = planner.conform(self.source, self.node, target)
        planner.emit(self.node, kernel, {self.source: conform}, {**others, linear.dim: rows})

    def _plan_grouped(
        self, planner: Planner, rows: tuple[int, ...], others: dict[int, tuple[int, ...]]
    ) -> None:
        """Keep the groups with rows; pad them to equal counts with zero rows and columns."""
        analysis, linear = planner.analysis, self.map
        fact, per_out, per_in = analysis.fact(self.source), linear.outputs, linear.inputs
        have = set(planner.physical(self.source, linear.dim)) if planner.exists(self.source) else ()
        zero_rows = self._constant_rows(analysis, rows)
        constant = {rows[position] for position in zero_rows}
        groups = sorted({row // per_out for row in rows})
        group_rows = [[r for r in rows if r // per_out == g] for g in groups]
        as_map = self.adds_border(analysis)
        columns: list[list[int]] = []
        borders: list[list[int]] = []
        for g, members in zip(groups, group_rows, strict=True):
            computed = [r - g * per_out for r in members if r not in constant]
            used = linear.connected[g, computed].any(0)
            local = [i for i in range(per_in) if used[i] and g * per_in + i in have]
            missing = [i for i in range(per_in) if used[i] and g * per_in + i not in have]
            border = self._border(fact, [g * per_in + i for i in missing])
            border = [i - g * per_in for i in border]
            if border and not as_map and not any(self._known(fact, g * per_in + i) != 0 for i in local):
                local.append(max(border, key=lambda i: abs(self._known(fact, g * per_in + i))))
                border.remove(local[-1])
            columns.append(local)
            borders.append(border)
        width = max(1, *(len(c) for c in columns))
        height = max(len(r) for r in group_rows)
        padded_columns = tuple(tuple(c + [FILL] * (width - len(c))) for c in columns)
        padded_rows = tuple(r for m in group_rows for r in m + [FILL] * (height - len(m)))
        pick = tuple(p for p, row in enumerate(padded_rows) if row != FILL)
        spots = tuple(p for p, row in enumerate(padded_rows) if row == FILL or row in constant)
        absent = [
            g * per_in + i
            for g, c in zip(groups, columns, strict=True)
            for i in range(per_in)
            if i not in c
        ]
        bias = planner.constant(
            f"{self.node.name}__bias", self._bias(analysis, padded_rows, absent, spots)
        )
        delta = border_map = ""
        if any(borders) and as_map:
            border_map = self._border_map(planner, padded_rows, borders, groups)
        elif any(borders):
            delta = self._carry(planner, padded_rows, padded_columns, borders, groups)
        # A pad column has weight 0, so any channel of the group that exists may stand there.
        feed = tuple(
            g * per_in + (i if i != FILL else c[0] if c and c[0] != FILL else 0)
            for g, c in zip(groups, padded_columns, strict=True)
            for i in c
        )
        kernel = SliceLinear(
            padded_rows,
            padded_columns,
            len(groups),
            spots,
            bias,
            delta,
            border_map,
            pick if len(pick) < len(padded_rows) else (),
        )
        conform = planner.conform(self.source, self.node, {**others, linear.dim: feed})
        layout = {**others, linear.dim: tuple(padded_rows[p] for p in pick)}
        planner.emit(self.node, kernel, {self.source: conform}, layout)

    # Helpers, from here down.

    def _grouped(self, values: Tensor, fact: Fact) -> Tensor:
        """Move the mapped dimension last and split it into groups."""
        total = self.map.groups * self.map.inputs
        values = values.movedim(self.map.dim, -1)
        values = values.expand(*values.shape[:-1], total)
        return values.unflatten(-1, (self.map.groups, self.map.inputs))

    def _reached_inputs(self, outputs: Tensor) -> Tensor:
        mask = outputs.movedim(self.map.dim, -1).unflatten(-1, (self.map.groups, self.map.outputs))
        reached = torch.einsum("...go,goi->...gi", mask.double(), self.map.connected.double()) > 0
        return reached.flatten(-2).movedim(-1, self.map.dim)

    def _line(self, summary: Tensor) -> Tensor:
        """Return a summary along the mapped dimension, the others being single or uniform."""
        line = summary.movedim(self.map.dim, -1).flatten(0, -2)[0]
        return line.expand(self.map.groups * self.map.inputs)

    def _known(self, fact: Fact, index: int) -> float:
        return 0.0 if bool(self._line(fact.live)[index]) else float(self._line(fact.known)[index])

    def _uniform(self, fact: Fact, missing: Sequence[int]) -> bool:
        """Whether the missing constants are the same over all other channel dimensions."""
        lines = fact.known.movedim(self.map.dim, -1).flatten(0, -2)
        if lines.shape[-1] == 1 or not missing:
            return True
        lines = lines[:, list(missing)]
        return bool(torch.equal(lines, lines[:1].expand_as(lines)))

    def _constant_rows(self, analysis: Analysis, rows: Sequence[int]) -> tuple[int, ...]:
        """Return positions of rows whose result is one constant, for the bias to hold."""
        fact = analysis.fact(self.node)
        lines = fact.const.movedim(self.map.dim, -1).flatten(0, -2)
        same = (lines == lines[:1]).all(0) & ~torch.isnan(lines).any(0)
        return tuple(position for position, row in enumerate(rows) if bool(same[row]))

    def _border_constants(self, analysis: Analysis) -> list[tuple[int, list[int]]]:
        """Return (offset, inputs) of groups with constants that kept rows see at the border."""
        linear, fact = self.map, analysis.fact(self.source)
        computed = self._line_any(analysis.keep[self.node] & analysis.fact(self.node).live)
        computed = computed.unflatten(0, (linear.groups, linear.outputs))
        seen = torch.einsum("go,goi->gi", computed.double(), linear.connected.double()) > 0
        visible = self._line(fact.known).unflatten(0, (linear.groups, linear.inputs)) != 0
        found = []
        for group, line in enumerate(seen & visible):
            indices = line.nonzero().flatten().tolist()
            if indices:
                found.append((group * linear.inputs, indices))
        return found

    def _line_any(self, summary: Tensor) -> Tensor:
        return summary.movedim(self.map.dim, -1).flatten(0, -2).any(0)

    def _border(self, fact: Fact, missing: Sequence[int]) -> list[int]:
        """Return the missing inputs that a zero-padded border makes visible."""
        return [i for i in missing if self.map.padded and self._known(fact, i) != 0]

    def _border_map(
        self,
        planner: Planner,
        rows: Sequence[int],
        borders: Sequence[Sequence[int]],
        groups: Sequence[int] = (0,),
    ) -> str:
        """Return the kernel from ones to what the missing constants contribute, sum of c_k * W_k."""
        weight = planner.analysis.module(self.node).weight.detach().double()
        fact, per_in = planner.analysis.fact(self.source), self.map.inputs
        height = len(rows) // len(groups)
        kernel = torch.zeros(len(rows), 1, *weight.shape[2:], dtype=torch.float64)
        for position, row in enumerate(rows):
            at = position // height
            for i in borders[at] if row != FILL else ():
                kernel[position, 0] += self._known(fact, groups[at] * per_in + i) * weight[row, i]
        return planner.constant(f"{self.node.name}__border", kernel)

    def _bias(
        self,
        analysis: Analysis,
        rows: Sequence[int],
        missing: Sequence[int],
        zero_rows: Sequence[int],
    ) -> Tensor:
        """Fold the missing constants, away from borders, into the bias; constants replace it."""
        linear, fact = self.map, analysis.fact(self.source)
        values = torch.zeros(linear.groups * linear.inputs, dtype=torch.float64)
        if missing and not linear.padded:
            values[list(missing)] = self._line(fact.known)[list(missing)]
        grouped = values.unflatten(0, (linear.groups, linear.inputs))
        bias = torch.einsum("gi,goi->go", grouped, linear.weight).flatten() + linear.bias
        folded = torch.stack(
            [bias[row] if row != FILL else torch.zeros((), dtype=bias.dtype) for row in rows]
        )
        out = analysis.fact(self.node)
        for position in zero_rows:
            row = rows[position]
            line = out.known.movedim(linear.dim, -1).flatten(0, -2)[0]
            folded[position] = line[row] if row != FILL else 0.0
        return folded

    def _carry(
        self,
        planner: Planner,
        rows: Sequence[int],
        columns: Sequence[Sequence[int]],
        borders: Sequence[Sequence[int]],
        groups: Sequence[int] = (0,),
    ) -> str:
        """Return the weight a carrier takes over: the sum of (c_k / c_j) * W_k, exact at borders."""
        module = planner.analysis.module(self.node)
        weight = module.weight.detach().double()
        fact = planner.analysis.fact(self.source)
        per_in = self.map.inputs
        height = len(rows) // len(groups)
        delta = torch.zeros(len(rows), len(columns[0]), *weight.shape[2:], dtype=torch.float64)
        for at, (group, local, border) in enumerate(zip(groups, columns, borders, strict=True)):
            if not border:
                continue
            constants = {
                p: self._known(fact, group * per_in + i) for p, i in enumerate(local) if i != FILL
            }
            carrier = max(constants, key=lambda p: abs(constants[p]))
            if constants[carrier] == 0:
                raise AssertionError(f"no carrier at {self.node.name}")
            for position in range(at * height, (at + 1) * height):
                row = rows[position]
                if row == FILL:
                    continue
                for i in border:
                    ratio = self._known(fact, group * per_in + i) / constants[carrier]
                    delta[position, carrier] += ratio * weight[row, i]
        return planner.constant(f"{self.node.name}__delta", delta)


def linear_map(analysis: Analysis, node: fx.Node) -> LinearMap | None:
    """Return the linear map of a node, or None if it is something else."""
    if node.op == "call_module":
        return _module_map(analysis, node)
    if node.target is F.linear and len(node.args) >= 2:
        return _functional_map(analysis, node)
    return None


def _module_map(analysis: Analysis, node: fx.Node) -> LinearMap | None:
    module = analysis.module(node)
    fact = analysis.values.get(node.args[0])
    if not isinstance(fact, Fact):
        return None
    forward = type(module).forward
    if isinstance(module, nn.Linear) and _is_linear(module):
        return _flat(module.weight, module.bias, len(fact.shape) - 1)
    plain = any(forward is cls.forward for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return None
    same = type(module).__name__ == "Conv2dSame"
    if not (plain or same) or any(axis != 1 for axis in fact.axes):
        return None
    if len(fact.shape) != module.weight.ndim:
        return None
    taps = module.weight.detach().double().flatten(2)
    groups, outputs = module.groups, module.out_channels // module.groups
    padding = module.padding
    padded = same or (padding == "same" and taps.shape[2] > 1)
    padded = padded or (not isinstance(padding, str) and any(p != 0 for p in padding))
    return LinearMap(
        taps.sum(2).unflatten(0, (groups, outputs)),
        (taps != 0).any(2).unflatten(0, (groups, outputs)),
        _bias_or_zeros(module.bias, module.out_channels),
        1,
        padded and module.padding_mode == "zeros",
        plain and isinstance(module, nn.Conv2d) and not isinstance(padding, str),
    )


def _is_linear(module: nn.Linear) -> bool:
    """Whether a Linear, or a subclass with a forward of its own, is weight * x + bias."""
    if type(module).forward is nn.Linear.forward:
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, module.in_features, generator=generator).to(module.weight)
    with torch.no_grad():
        return torch.equal(module(x), F.linear(x, module.weight, module.bias))


def _functional_map(analysis: Analysis, node: fx.Node) -> LinearMap | None:
    x, weight, *rest = node.args
    bias = rest[0] if rest else node.kwargs.get("bias")
    fact = analysis.values.get(x) if isinstance(x, fx.Node) else None
    parameters = [p for p in (weight, bias) if p is not None]
    if not isinstance(fact, Fact) or not all(
        isinstance(p, fx.Node) and p.op == "get_attr" and len(p.users) == 1 for p in parameters
    ):
        return None
    values = [analysis.fact(p).const for p in parameters if isinstance(p, fx.Node)]
    return _flat(values[0], values[1] if len(values) > 1 else None, len(fact.shape) - 1)


def _flat(weight: Tensor, bias: Tensor | None, dim: int) -> LinearMap:
    matrix = weight.detach().double().unsqueeze(0)
    return LinearMap(matrix, matrix != 0, _bias_or_zeros(bias, matrix.shape[1]), dim, False)


def _bias_or_zeros(bias: Tensor | None, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float64) if bias is None else bias.detach().double()


def _output_shape(analysis: Analysis, node: fx.Node) -> tuple[int, ...]:
    shape = node.meta["shape"]
    assert isinstance(shape, tuple) and math.prod(shape) > 0
    return shape
