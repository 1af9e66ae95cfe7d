"""Sizes that are looked up (by hash, as text, by type) decide under a guard, never in silence."""

import contextlib
import enum
import functools
import logging

import pytest
import torch
from test_prune_kinds import half_off
from test_sized import answer
from torch import nn

import prifu_plugin as prifu
from prifu_plugin.errors import CaptureError
from prifu_plugin.graph.capture import capture
from prifu_plugin.prune.verify import difference

LOOKUPS = {
    "set": lambda self, h, w: h in {40, 56},
    "shape in set": lambda self, h, w: tuple(self.x.shape[-2:]) in {(40, 40)},
    "key": lambda self, h, w: {40: True}.get(w, False),
    "pair": lambda self, h, w: (h, w) in self.by,
    "text": lambda self, h, w: f"{h}x{w}" in self.by,
    "text of a shape": lambda self, h, w: str(tuple(self.x.shape[-2:])) in self.by,
    "repr": lambda self, h, w: f"{h!r}" in self.by,
    "percent": lambda self, h, w: "%d" % w in self.by,  # noqa: UP031
    "attribute": lambda self, h, w: hasattr(self, f"t{w}"),
    "distinct": lambda self, h, w: len({h, w}) == 1,
    "type": lambda self, h, w: isinstance(w, int) and w == 40,
    "type of a shape": lambda self, h, w: isinstance(self.x.shape, tuple) and h == w,
    "type of a ratio": lambda self, h, w: isinstance(h / w, float) and h / w == 1,
    "cached": lambda self, h, w: same(h, w),
}


class Size(enum.Enum):
    LARGE = 40


def by_enum(self, h, w):
    try:
        return Size(w) is Size.LARGE
    except ValueError:
        return False


def by_int(self, h, w):
    try:
        return int(w) > 30
    except TypeError:
        return False


def suppressed(self, h, w):
    with contextlib.suppress(Exception):
        if w > 30:
            return True
    return False


def by_index(self, h, w):
    try:
        return self.x.shape.index(40) > 0
    except ValueError:
        return False


def by_key(self, h, w):
    try:
        return {40: True}[w]
    except Exception:
        return False


def by_range(self, h, w):
    try:
        return len(range(w)) > 30
    except (TypeError, ValueError, RuntimeError):
        return False


CAUGHT = [by_enum, by_int, suppressed, by_index, by_key, by_range]


@functools.lru_cache
def same(h, w):
    return h == w


class LooksUp(nn.Module):
    """Takes one way for some sizes, another for all others; `also` is what plain fx cannot do."""

    def __init__(self, asks, *, also=False):
        super().__init__()
        self.asks, self.also = asks, also
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last, self.other = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.by = {"40x40": 0, "(40, 40)": 0, "40": 0, (40, 40): 0}
        self.t40 = True

    def forward(self, x):
        self.x = x
        h, w = (x.shape[2], x.shape[3])
        y = self.norm(self.first(x))
        if self.also and y.shape[1] > 3:
            y = y + 1
        return self.other(y) if self.asks(self, h, w) else self.last(y)


@pytest.mark.parametrize("also", [False, True])
@pytest.mark.parametrize("asks", LOOKUPS.values(), ids=list(LOOKUPS))
def test_sizes_that_are_looked_up_are_guarded(asks, also):
    torch.manual_seed(0)
    model = half_off(prifu.wrap(LooksUp(asks, also=also)))
    pruned = prifu.prune(model, torch.zeros(2, 3, 16, 24))
    assert difference(model(x := torch.randn(2, 3, 16, 24)), pruned(x)) <= 1e-5
    for size in ((40, 40), (24, 16), (56, 40)):
        x = torch.randn(2, 3, *size)
        found = answer(pruned, x)
        assert isinstance(found, str) or difference(model(x), found) <= 1e-5


@pytest.mark.parametrize("also", [False, True])
@pytest.mark.parametrize("asks", CAUGHT)
def test_errors_that_the_forward_catches_decide_nothing_unseen(asks, also):
    torch.manual_seed(0)
    model = half_off(prifu.wrap(LooksUp(asks, also=also)))
    try:
        pruned = prifu.prune(model, torch.zeros(2, 3, 16, 24))
    except CaptureError:
        return
    for size in ((16, 24), (40, 40), (24, 16), (56, 40)):
        x = torch.randn(2, 3, *size)
        found = answer(pruned, x)
        assert isinstance(found, str) or difference(model(x), found) <= 1e-5


ROUNDED = {
    "divmod": lambda x: 1 + divmod(x.shape[2], 100)[0],
    "round": lambda x: round(x.shape[2] / 8),
    "attribute": lambda x: 2 if hasattr(x.shape[2], "hint") or hasattr(x, "tensors") else 3,
}


class Scales(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(self.norm(self.first(x))) * self.by(x)


@pytest.mark.parametrize("by", ROUNDED.values(), ids=list(ROUNDED))
def test_harmless_python_on_sizes_is_followed(by):
    model = half_off(prifu.wrap(Scales(by)))
    pruned = prifu.prune(model, torch.zeros(2, 3, 16, 24))
    for size in ((16, 24), (40, 40), (128, 128)):
        x = torch.randn(2, 3, *size)
        assert difference(model(x), pruned(x)) <= 1e-5


def test_what_is_looked_up_by_the_batch_is_refused():
    model = half_off(prifu.wrap(LooksUp(lambda self, h, w: self.x.shape in {(2, 3, 40, 40)})))
    with pytest.raises(CaptureError, match="for each batch size"):
        prifu.prune(model, torch.zeros(2, 3, 16, 24))


class Says(nn.Module):
    """Asserts with a text of sizes, which decides nothing."""

    def __init__(self, words):
        super().__init__()
        self.words = words
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        h = x.shape[2]
        torch._assert(h % 4 == 0, self.words(x))
        y = self.norm(self.first(x))
        return self.last(y)


@pytest.mark.parametrize(
    "words", [lambda x: f"height {x.shape[2]}", lambda x: "of " + str(x.shape), lambda x: f"{x!r}"]
)
def test_texts_in_assertions_decide_nothing(words):
    model = half_off(prifu.wrap(Says(words)))
    assert capture(Says(words)).way == "graph"
    pruned = prifu.prune(model, torch.zeros(2, 3, 16, 24))
    x = torch.randn(3, 3, 8, 40)
    assert difference(model(x), pruned(x)) <= 1e-5


def test_a_capture_leaves_no_proxies_in_caches():
    model = half_off(prifu.wrap(LooksUp(LOOKUPS["cached"], also=True)))
    same.cache_clear()
    prifu.prune(model, torch.zeros(2, 3, 40, 40))
    assert same(40, 40) is True
    assert difference(model(x := torch.randn(2, 3, 40, 40)), model(x)) == 0


class ByTensor(nn.Module):
    """Remembers what it has seen of tensors: by identity, as Python does."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.norm(self.first(x))
        seen = {y: 2.0}
        return self.last(y) * seen[y]


def test_tensors_are_looked_up_by_identity():
    model = half_off(prifu.wrap(ByTensor()))
    pruned = prifu.prune(model, torch.zeros(2, 3, 16, 24))
    x = torch.randn(3, 3, 8, 40)
    assert difference(model(x), pruned(x)) <= 1e-5


SAYS = {
    "log": lambda x: logging.getLogger("net").debug(f"size {x.shape[2]}"),
    "log that is kept": lambda x: logging.getLogger("net").warning("size %s", x.shape[2]),
    "print": lambda x: print("size", x.shape[2], x),
    "text": lambda x: print(f"size {x.shape!s}"),
}


class Talks(nn.Module):
    """Tells of sizes what decides nothing."""

    def __init__(self, says):
        super().__init__()
        self.says = says
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        self.says(x)
        h = nn.functional.layer_norm(self.first(x).movedim(1, -1), (8,))
        return self.last(h.movedim(-1, 1))


@pytest.mark.parametrize("says", SAYS.values(), ids=list(SAYS))
def test_what_is_only_said_decides_nothing(says):
    model = prifu.wrap(Talks(says), example_inputs=torch.zeros(2, 3, 16, 24)).eval()
    ((_, unit),) = prifu.filters(model).items()
    unit.weight.data[::2] = 0.0
    assert capture(Talks(says)).way == "graph"
    pruned = prifu.prune(model, torch.zeros(2, 3, 16, 24))
    x = torch.randn(3, 3, 8, 40)
    assert difference(model(x), pruned(x)) <= 1e-5
