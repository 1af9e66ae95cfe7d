"""What holds at the sizes that were analysed, and not at others, is made for one size."""

import pytest
import torch
from test_prune_kinds import half_off
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.prune import certificate
from prifu_plugin.prune.verify import difference

HERE = (2, 3, 16, 16)


class Taken(nn.Module):
    """Takes elements by literal numbers where channels and places share one dimension."""

    def __init__(self, take):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.take = take

    def forward(self, x):
        y = self.features(x)
        return self.take(y)


TAKES = {
    "slice": lambda y: y.flatten(1)[:, :100],
    "index": lambda y: y.flatten(1)[:, 100],
    "narrow": lambda y: y.flatten(1).narrow(1, 40, 60),
    "selected": lambda y: y.flatten(1).index_select(1, torch.tensor([3, 70])),
    "into a product": lambda y: y.flatten(1)[:, :100] @ torch.ones(100, 3),
    "into parts": lambda y: y.flatten(1)[:, :128].unflatten(1, (8, 4, 4)),
    "of squares": lambda y: (y @ y).flatten(1)[:, :100],
    "elements, one of which is often 0": lambda y: y.flatten(1)[:, [3, 70, -5]],
    "the last but some": lambda y: y.flatten(1)[:, -30],
    "with the batch": lambda y: y.flatten(0, 1)[1].flatten()[:64],
}


def made(take):
    torch.manual_seed(0)
    wrapped = half_off(prifu.wrap(Taken(take)), seed=2)
    prifu.filters(wrapped)["features.1"].weight.data[:4] = 1.0
    return wrapped


@pytest.mark.parametrize("take", TAKES)
def test_no_size_gives_another_answer(take):
    wrapped = made(TAKES[take])
    pruned = prifu.prune(wrapped, torch.randn(HERE))
    answered = 0
    for size in (4, 8, 11, 16, 19, 40):
        x = torch.randn(3, 3, size, size)
        try:
            expected = wrapped(x)
        except Exception:  # too small for the model itself
            continue
        try:
            found = pruned(x)
        except AssertionError as error:
            if "made for other input sizes" not in str(error) or size == 16:
                raise
            continue
        assert difference(expected, found) < 1e-5
        answered += 1
    assert answered


def test_a_pruned_model_that_fails_elsewhere_is_made_for_one_size(monkeypatch):
    compare = certificate.compare

    def failing(filtered, pruned, inputs, seed, *args, **kwargs):
        if inputs.shapes[0][-1] == 4:
            raise RuntimeError("of torch")
        return compare(filtered, pruned, inputs, seed, *args, **kwargs)

    monkeypatch.setattr(certificate, "compare", failing)
    wrapped = made(lambda y: y.mean((2, 3)))
    pruned = prifu.prune(wrapped, torch.randn(HERE))
    assert "made for inputs of this size: at another, it differs" in str(prifu.report(pruned))
    assert "[(4, 3, 4, 4)]" in str(prifu.report(pruned))


def test_it_says_so_and_can_be_made_again():
    wrapped = made(TAKES["slice"])
    pruned = prifu.prune(wrapped, torch.randn(HERE))
    report = prifu.report(pruned)
    assert "made for inputs of this size: at another, it differs" in str(report)
    assert pruned.get_submodule("features.0").out_channels < 8
    with pytest.raises(AssertionError, match="other input sizes"):
        pruned(torch.randn(2, 3, 8, 8))
    plan, state = prifu.plan(pruned), pruned.state_dict()
    again = prifu.rebuild(Taken(TAKES["slice"]), plan, state)
    x = torch.randn(5, 3, 16, 16)
    assert difference(pruned(x), again(x)) == 0
    with pytest.raises(AssertionError, match="other input sizes"):
        again(torch.randn(2, 3, 8, 8))


class Spread(nn.Module):
    """Tells channels by their spread, which one place has not."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.features(x).std((2, 3)))


@pytest.mark.filterwarnings("ignore:std")
def test_a_size_at_which_the_model_itself_gives_no_number_shows_nothing():
    torch.manual_seed(0)
    wrapped = half_off(prifu.wrap(Spread()))
    pruned = prifu.prune(wrapped, torch.randn(2, 3, 8, 8))
    shapes = [check.shapes for check in prifu.report(pruned).checks]
    assert ((4, 3, 2, 2),) in shapes
    assert not [shape for ((*_, shape),) in shapes if shape == 1]
    x = torch.randn(3, 3, 20, 20)
    assert difference(wrapped(x), pruned(x)) < 1e-5
