"""Random networks, random masks: the pruned model equals the filtered one in fp64."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from random_net import RandomNet, close_channels
from torch.utils import _pytree as pytree

import prifu_plugin as prifu

CASES = {
    "seed": st.integers(0, 10**6),
    "size": st.integers(1, 12),
    "bias": st.booleans(),
    "share": st.sampled_from([0.1, 0.5, 0.9]),
    "round_to": st.sampled_from([1, 1, 4, 2**30]),
    "move_cost": st.sampled_from([0.0, 0.0, 8.0, 64.0, float("inf")]),
}


def check(seed, size, bias, share, round_to=1, move_cost=0.0):
    torch.manual_seed(seed)
    net = RandomNet(seed, size).double()
    if not prifu.sites(net):
        return
    wrapped = prifu.wrap(net, bias=bias)
    close_channels(wrapped, share, torch.Generator().manual_seed(seed))
    costs = {"round_to": round_to, "move_cost": move_cost}
    pruned = prifu.prune(wrapped, torch.zeros(2, 3, 9, 8), verify=False, **costs)
    for shape in ((1, 3, 9, 8), (3, 3, 11, 12)):
        x = torch.randn(shape, dtype=torch.float64)
        expected, found = pytree.tree_leaves(wrapped(x)), pytree.tree_leaves(pruned(x))
        for a, b in zip(expected, found, strict=True):
            assert a.shape == b.shape
            scale = max(float(a.detach().abs().max()), 1e-3)
            assert float((a - b).detach().abs().max()) <= 1e-11 * scale


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(**CASES)
@example(seed=0, size=6, bias=True, share=0.5, round_to=1, move_cost=0.0)
def test_random_networks(seed, size, bias, share, round_to, move_cost):
    check(seed, size, bias, share, round_to, move_cost)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [pytest.param(False, marks=pytest.mark.long), True])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(**{name: case for name, case in CASES.items() if name != "bias"})
def test_many_random_networks(bias, seed, size, share, round_to, move_cost):
    check(seed, size, bias, share, round_to, move_cost)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("block", range(12))
def test_six_hundred_seeds(block):
    for seed in range(3000 + 50 * block, 3050 + 50 * block):
        share, round_to = [0.1, 0.5, 0.9][seed % 3], [1, 1, 4][seed // 3 % 3]
        move_cost = [0.0, 64.0, float("inf")][seed // 9 % 3]
        check(seed, 1 + seed % 12, seed % 2 == 0, share, round_to, move_cost)


@pytest.mark.parametrize("seed", [81, 166, 191, 479, 562, 575, 659, 1698])
def test_networks_that_failed_once(seed):
    check(seed, 1 + seed % 12, seed % 2 == 0, [0.1, 0.5, 0.9][seed % 3], [1, 1, 4][seed // 3 % 3])
