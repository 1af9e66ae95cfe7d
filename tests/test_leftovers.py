"""Nothing of a trace stays in caches of classes and of files."""

import pytest
import torch
from torch import fx, nn

import prifu_plugin as prifu

MEMO = None
TABLE = {}
LISTED = []


class Block(nn.Module):
    table = {}  # noqa: RUF012 - shared, as forwards do
    last = None

    def __init__(self, body, also):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.last_layer = nn.Conv2d(8, 4, 1)
        self.body, self.also = body, also

    def forward(self, x):
        y = self.body(self, x, self.last_layer(self.norm(self.first(x))))
        return y * 2 if self.also and y.shape[1] > 3 else y


def in_file(self, x, y):
    global MEMO
    if MEMO is None:
        MEMO = x.new_ones(1) * 2
    return y * MEMO


def in_table_of_file(self, x, y):
    if "k" not in TABLE:
        TABLE["k"] = x.new_ones(1) * 2
    return y * TABLE["k"]


def in_list_of_file(self, x, y):
    LISTED.append(y)
    return y + 1


def in_table_of_class(self, x, y):
    if f"{x.shape[2]}" not in self.table:
        self.table[f"{x.shape[2]}"] = torch.arange(x.shape[2]).to(x)
    return y * self.table[f"{x.shape[2]}"][:, None]


def in_class(self, x, y):
    if Block.last is None:
        Block.last = y
    return y + 1


@pytest.mark.parametrize("also", [False, True])
@pytest.mark.parametrize(
    "body", [in_file, in_table_of_file, in_list_of_file, in_table_of_class, in_class]
)
def test_caches_hold_no_proxies(body, also):
    global MEMO
    MEMO, Block.last = None, None
    TABLE.clear(), LISTED.clear(), Block.table.clear()
    x = torch.randn(2, 3, 16, 16)
    model = prifu.wrap(Block(body, also), example_inputs=x).eval()
    prifu.filters(model)["norm"].weight.data[::2] = 0.0
    pruned = prifu.prune(model, x)
    kept = [MEMO, Block.last, *TABLE.values(), *LISTED, *Block.table.values(), *Block.table]
    assert not any(isinstance(one, fx.Proxy) or "\x02" in str(one) for one in kept)
    torch.testing.assert_close(pruned(x), model(x))
