"""What the analysis calls constant, against two oracles that run the network's own operations.

Soundness: a constant has its value at every position, for every input. Completeness: what an input
of NaN does not reach, and is the same everywhere, is found.
"""

import copy

import pytest
import torch
from random_net import RandomNet, close_channels
from torch import Tensor, fx

import prifu_plugin as prifu
from prifu_plugin.prune.elementwise import PRODUCTS
from prifu_plugin.prune.examples import record_examples
from prifu_plugin.prune.facts import Fact
from prifu_plugin.prune.lower import lower
from prifu_plugin.prune.rules import analyse
from prifu_plugin.prune.rules.opaque import OpaqueRule


class Poison(fx.Interpreter):
    """Run a graph and keep every value; a closed filter emits what its layer says on zeros."""

    def run_node(self, n):
        result = super().run_node(n)
        module = self.submodules.get(n.target) if n.op == "call_module" else None
        if getattr(module, "prifu", None) is not None:
            unit, x = module.prifu, self.map_nodes_to_values(n.args, n)[0]
            clean = module(torch.zeros_like(x)).movedim(unit.dim, 0)
            result = result.movedim(unit.dim, 0).clone()
            result[unit.closed] = clean[unit.closed]
            result = result.movedim(0, unit.dim)
        self.seen[n] = result
        return result


def values(model, graph, x):
    interpreter = Poison(model, graph=graph)
    interpreter.submodules = dict(model.named_modules())
    interpreter.seen = {}
    with torch.no_grad():
        interpreter.run(x)
    return interpreter.seen


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_constants(seed, bias):
    torch.manual_seed(seed)
    net = RandomNet(seed, 8).double()
    model = prifu.wrap(net, bias=bias)
    close_channels(model, 0.5, torch.Generator().manual_seed(seed))
    model = copy.deepcopy(model)
    captured = lower(model)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    record_examples(model, captured.graph, [x])
    analysis = analyse(model, captured.graph)
    real = values(model, captured.graph, x)
    poisoned = values(model, captured.graph, torch.full_like(x, torch.nan))
    beyond, found = set(), 0  # nodes where the oracle knows what depends on the resolution
    for node in captured.graph.nodes:
        fact = analysis.values.get(node)
        if any(source in beyond for source in node.all_input_nodes):
            beyond.add(node)
        if not isinstance(fact, Fact) or not isinstance(real[node], Tensor):
            continue
        known = fact.const.expand(real[node].shape)
        gap = torch.where(torch.isnan(known), 0.0, (known - real[node]).abs())
        assert gap.max() <= 1e-9 * (1 + real[node].abs().max()), node.name
        if fact.static or not fact.axes:
            beyond.update({node} if isinstance(analysis.rules[node], OpaqueRule) else ())
            continue
        lines = poisoned[node].movedim(fact.axes[0], 0).flatten(1)
        # An operation that swallows NaN fools the oracle; its value then differs.
        true = torch.isclose(lines, real[node].movedim(fact.axes[0], 0).flatten(1)).all(1)
        same = (lines == lines[:, :1]).all(1) & true
        live = fact.live.movedim(fact.axes[0], 0).flatten(1).any(1).expand(len(lines))
        if (true & ~same).any():
            beyond.add(node)
        if node not in beyond and node.target not in PRODUCTS:
            assert not (same & live).any(), node.name
        found += int((same & ~live).sum())
    assert found
