"""How linear maps are sliced."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prifu_plugin.prune.facts import Fact
from prifu_plugin.prune.layout import FILL
from prifu_plugin.prune.plan import SliceLinear
from prifu_plugin.prune.planner import Planner
from prifu_plugin.prune.rules.base import Analysis
from prifu_plugin.prune.rules.linear_facts import LinearFacts, lines_along
from prifu_plugin.prune.transposed import rows_of_outputs

GATHER = 64
"""Multiply-accumulates that take as long as moving one value."""


class LinearRule(LinearFacts):
    """A linear map at one node."""

    def plan(self, planner: Planner) -> None:
        """Slice rows to what is kept and columns to what exists."""
        kept = planner.kept(self.node)
        if kept is None:
            return
        rows = kept.pop(self.map.dim)
        if self.map.groups == 1:
            self._plan_dense(planner, rows, kept)
        else:
            self._plan_grouped(planner, rows, kept)

    def _plan_dense(
        self, planner: Planner, rows: tuple[int, ...], others: dict[int, tuple[int, ...]]
    ) -> None:
        analysis, linear = planner.analysis, self.map
        fact = self._fact(analysis)
        columns = planner.agreed(self.node, lambda: self._columns(planner))
        there = set(columns)
        missing = [i for i in range(linear.inputs) if i not in there]
        if not self._uniform(fact, missing):
            columns, missing = tuple(range(linear.inputs)), []
        self._note_sharing(analysis, columns)
        zero_rows = self._constant_rows(analysis, rows)
        name = self._name(analysis)
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
        fact, per_out, per_in = self._fact(analysis), linear.outputs, linear.inputs
        have = set(planner.agreed(self.node, lambda: tuple(self._existing(planner))))
        zero_rows = self._constant_rows(analysis, rows)
        constant = {rows[position] for position in zero_rows}
        groups = sorted({row // per_out for row in rows})
        group_rows = _by_group(rows, groups, per_out)
        as_map = self.adds_border(analysis)
        varying = [row for row in rows if row not in constant]
        columns, borders = self._group_inputs(fact, groups, varying, have, as_map)
        width = max(1, *(len(c) for c in columns))
        height = max(len(r) for r in group_rows)
        self._note_padding(planner, columns, width, group_rows, height)
        padded_columns = tuple(tuple(c + [FILL] * (width - len(c))) for c in columns)
        padded_rows = tuple(r for m in group_rows for r in m + [FILL] * (height - len(m)))
        pick = tuple(p for p, row in enumerate(padded_rows) if row != FILL)
        spots = tuple(p for p, row in enumerate(padded_rows) if row == FILL or row in constant)
        absent = _absent(groups, columns, per_in)
        values = self._bias(analysis, padded_rows, absent, spots)
        bias = planner.constant(f"{self._name(analysis)}__bias", values)
        delta = border_map = ""
        if any(borders) and as_map:
            border_map = self._border_map(planner, padded_rows, borders, groups)
        elif any(borders):
            delta = self._carry(planner, padded_rows, padded_columns, borders, groups)
        feed = _feed(groups, padded_columns, per_in)
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

    def _note_sharing(self, analysis: Analysis, columns: Sequence[int]) -> None:
        """Say once in the report what one slice for several calls costs, from a tenth on."""
        calls = self._calls(analysis)
        if len(calls) == 1 or calls[0].node is not self.node or not columns:
            return
        read = [int(rule._line(rule._fact(analysis).live)[list(columns)].sum()) for rule in calls]
        share = 1 - sum(read) / (len(calls) * len(columns))
        if share > 0.1:
            note = f"one slice serves {len(calls)} calls: {100 * share:.0f} % of what it reads"
            analysis.notes.append((self.node.name, f"{note} is constant in the call at hand"))

    def _note_padding(
        self,
        planner: Planner,
        columns: list[list[int]],
        width: int,
        rows: list[list[int]],
        height: int,
    ) -> None:
        """Say in the report what equal groups cost, where it is a tenth of the work or more."""
        work = sum(len(c) * len(r) for c, r in zip(columns, rows, strict=True))
        padded = len(columns) * width * height
        if padded > 1.1 * work:
            share = f"{100 * (1 - work / padded):.0f} %"
            note = f"groups are of unequal width: {share} of its work is padding"
            planner.analysis.notes.append((self.node.name, note))

    def _group_inputs(
        self,
        fact: Fact,
        groups: Sequence[int],
        rows: Sequence[int],
        have: set[int],
        as_map: bool,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Return for each group the inputs it reads, and the constants its border shows."""
        known: list[float] = self._line(fact.known).tolist()
        columns: list[list[int]] = []
        borders: list[list[int]] = []
        for g, used in zip(groups, self._read_by(rows, groups), strict=True):
            first = g * self.map.inputs
            local = [i for i in used if first + i in have]
            border = [i for i in used if first + i not in have and known[first + i] != 0]
            border = border if self.map.padded else []
            if border and not as_map and not any(known[first + i] for i in local):
                local.append(max(border, key=lambda i: abs(known[first + i])))
                border.remove(local[-1])
            columns.append(local)
            borders.append(border)
        return columns, borders

    def _read_by(self, rows: Sequence[int], groups: Sequence[int]) -> list[list[int]]:
        """Return for each group the inputs within it that some of its rows are connected to."""
        linear = self.map
        asked = torch.zeros(linear.groups * linear.outputs, dtype=torch.bool)
        asked[list(rows)] = True
        asked = asked.unflatten(0, (linear.groups, linear.outputs))
        used = (linear.connected & asked[:, :, None]).any(1)[list(groups)]
        return [[i for i, reads in enumerate(line) if reads] for line in used.tolist()]

    def _name(self, analysis: Analysis) -> str:
        """Return the name of the first call of the layer, after which its constants are named."""
        return analysis.calls_kept(self.node)[0].name

    def _calls(self, analysis: Analysis) -> list[LinearRule]:
        rules = [analysis.rules[call] for call in analysis.calls_kept(self.node)]
        return [rule for rule in rules if isinstance(rule, LinearRule)]

    def _columns(self, planner: Planner) -> tuple[int, ...]:
        """Return the inputs that a dense layer is to read, in the order in which they come."""
        first = tuple(range(self.map.inputs))
        if planner.exists(self.source):
            first = planner.physical(self.source, self.map.dim)
        calls = self._calls(planner.analysis)
        if len(calls) == 1:
            columns = self._worth_computing(planner, first)
            return (*columns, *sorted(self._differing(planner.analysis).difference(columns)))
        agreed = self._existing(planner)
        in_order = [i for i in first if i in agreed]
        return (*in_order, *sorted(agreed.difference(in_order)))

    def _existing(self, planner: Planner) -> frozenset[int]:
        """Return the inputs that exist: for several calls, in any; and constants that differ."""
        analysis, calls = planner.analysis, self._calls(planner.analysis)
        if len(calls) == 1:
            there = planner.exists(self.source)
            found = planner.physical(self.source, self.map.dim) if there else ()
            return self._differing(analysis).union(found)
        total = self.map.groups * self.map.inputs
        asked = torch.zeros(total, dtype=torch.bool)
        known = [rule._line(rule._fact(analysis).known) for rule in calls]
        for rule, line in zip(calls, known, strict=True):
            asked = asked | rule._line_any(analysis.keep[rule.source]) | (line != known[0])
            border = self.map.padded and not self.adds_border(analysis)
            if border or not rule._uniform(rule._fact(analysis), range(total)):
                asked = asked | (line != 0)
        return frozenset(asked.nonzero().flatten().tolist())

    def _differing(self, analysis: Analysis) -> frozenset[int]:
        """Return the inputs that are constant at each place, but not the same everywhere.

        A kernel that spans places reads them all; where they do not exist, they are filled in.
        """
        if not self.map.spans or analysis.fact(self.source).axes == (self.map.dim,):
            return frozenset()
        live = self._line(self._fact(analysis).live)
        return frozenset(live.nonzero().flatten().tolist())

    def _worth_computing(self, planner: Planner, columns: tuple[int, ...]) -> tuple[int, ...]:
        """Leave out constants that the source has kept, where that saves more than a gather costs.

        An operation without slices, as attention is, gives all of its channels.
        """
        if not planner.exists(self.source):
            return columns
        keep: list[bool] = self._line_any(planner.analysis.keep[self.source]).tolist()
        fewer = tuple(c for c in columns if keep[c if len(keep) > 1 else 0])
        saved = (len(columns) - len(fewer)) * self.map.outputs
        dear = max(GATHER, planner.analysis.move_cost) * len(fewer)
        return fewer if fewer and saved > dear else columns

    def _constant_rows(self, analysis: Analysis, rows: Sequence[int]) -> tuple[int, ...]:
        """Return positions of rows whose result is one constant in all calls, for the bias."""
        lines = []
        for rule in self._calls(analysis):
            const = analysis.fact(rule.node).const
            lines.append(lines_along(const, rule.map.dim))
        stacked = torch.cat(lines)
        same: list[bool] = (stacked == stacked[0]).all(0).tolist()  # which live ones are not: NaN
        return tuple(position for position, row in enumerate(rows) if same[row])

    def _border_map(
        self,
        planner: Planner,
        rows: Sequence[int],
        borders: Sequence[Sequence[int]],
        groups: Sequence[int] = (0,),
    ) -> str:
        """Return the kernel from ones to what missing constants contribute, sum of c_k * W_k."""
        weight = rows_of_outputs(planner.analysis.module(self.node)).double()
        known, per_in = self._line(self._fact(planner.analysis).known), self.map.inputs
        kernel = torch.zeros(len(rows), 1, *weight.shape[2:], dtype=torch.float64)
        for at, (group, border) in enumerate(zip(groups, borders, strict=True)):
            values = known[[group * per_in + i for i in border]]
            places, taps = _rows_of(rows, at, len(groups), weight, border)
            kernel[places, 0] = torch.einsum("i,ri...->r...", values, taps)
        return planner.constant(f"{self._name(planner.analysis)}__border", kernel)

    def _bias(
        self,
        analysis: Analysis,
        rows: Sequence[int],
        missing: Sequence[int],
        zero_rows: Sequence[int],
    ) -> Tensor:
        """Fold the missing constants, away from borders, into the bias; constants replace it."""
        linear, fact = self.map, self._fact(analysis)
        values = torch.zeros(linear.groups * linear.inputs, dtype=torch.float64)
        if missing and not linear.padded:
            values[list(missing)] = self._line(fact.known)[list(missing)]
        grouped = values.unflatten(0, (linear.groups, linear.inputs))
        bias = torch.einsum("gi,goi->go", grouped, linear.weight).flatten() + linear.bias
        out = lines_along(analysis.fact(self.node).known, linear.dim)[0]
        index = torch.tensor(rows)
        at_zero = torch.zeros(len(rows), dtype=torch.bool)
        at_zero[list(zero_rows)] = True
        folded = torch.where(at_zero, out[index.clamp_min(0)], bias[index.clamp_min(0)])
        return torch.where(index == FILL, 0.0, folded)

    def _carry(
        self,
        planner: Planner,
        rows: Sequence[int],
        columns: Sequence[Sequence[int]],
        borders: Sequence[Sequence[int]],
        groups: Sequence[int] = (0,),
    ) -> str:
        """Return what a carrier's weight takes over, sum of (c_k / c_j) * W_k: exact at borders."""
        weight = rows_of_outputs(planner.analysis.module(self.node)).double()
        known, per_in = self._line(self._fact(planner.analysis).known), self.map.inputs
        delta = torch.zeros(len(rows), len(columns[0]), *weight.shape[2:], dtype=torch.float64)
        for at, (group, local, border) in enumerate(zip(groups, columns, borders, strict=True)):
            if not border:
                continue
            size = {p: abs(float(known[group * per_in + i])) for p, i in enumerate(local) if i >= 0}
            carrier = max(size, key=lambda p: size[p])
            ratios = known[[group * per_in + i for i in border]]
            ratios = ratios / known[group * per_in + local[carrier]]
            places, taps = _rows_of(rows, at, len(groups), weight, border)
            delta[places, carrier] += torch.einsum("i,ri...->r...", ratios, taps)
        return planner.constant(f"{self._name(planner.analysis)}__delta", delta)


def _rows_of(
    rows: Sequence[int], group: int, groups: int, weight: Tensor, inputs: Sequence[int]
) -> tuple[list[int], Tensor]:
    """Return the positions of a group's rows, pads left out, and their taps on some inputs."""
    height = len(rows) // groups
    places = [p for p in range(group * height, (group + 1) * height) if rows[p] != FILL]
    return places, weight[[rows[p] for p in places]][:, list(inputs)]


def _by_group(rows: Sequence[int], groups: Sequence[int], per_group: int) -> list[list[int]]:
    """Return the rows of each group, in their order."""
    found: dict[int, list[int]] = {group: [] for group in groups}
    for row in rows:
        found[row // per_group].append(row)
    return [found[group] for group in groups]


def _absent(groups: list[int], columns: list[list[int]], per_group: int) -> list[int]:
    """Return the inputs of some groups that are not among their columns."""
    return [
        group * per_group + i
        for group, taken in zip(groups, columns, strict=True)
        for i in range(per_group)
        if i not in taken
    ]


def _feed(
    groups: list[int], columns: tuple[tuple[int, ...], ...], per_group: int
) -> tuple[int, ...]:
    """Return which inputs the columns read: where one is padding of weight 0, any that exists."""
    return tuple(
        group * per_group + (i if i != FILL else own[0] if own and own[0] != FILL else 0)
        for group, own in zip(groups, columns, strict=True)
        for i in own
    )
