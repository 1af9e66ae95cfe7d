"""Random networks of convolutions, norms, adds, concats, splits, shuffles, groups, attention."""

import random

import torch
import torch.nn.functional as F
from torch import nn

import prifu_plugin as prifu

ACTIVATIONS = [nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Identity, nn.Tanh]


class RandomNet(nn.Module):
    """A network drawn from a seed; forward runs its steps on a list of feature maps."""

    def __init__(self, seed, size):
        super().__init__()
        self.draw = random.Random(seed)
        self.parts = nn.ModuleList()
        self.steps = []
        self.widths = []
        self._block(None, 3, self.draw.choice([4, 6, 8]))
        kinds = [name[6:] for name in dir(self) if name.startswith("_grow_")]
        for _ in range(size):
            getattr(self, f"_grow_{self.draw.choice(kinds)}")()
        self.head = nn.Linear(self.widths[-1], 5)
        self.several = self.draw.random() < 0.2

    def forward(self, x):
        maps = []
        for function, inputs, part in self.steps:
            arguments = [x if i is None else maps[i] for i in inputs]
            maps.append(function(self.parts[part] if part is not None else None, *arguments))
        out = self.head(maps[-1].mean((2, 3)))
        return (out, maps[-1]) if self.several else out

    def _step(self, function, inputs, width, part=None):
        if part is not None:
            self.parts.append(part)
        self.steps.append((function, inputs, None if part is None else len(self.parts) - 1))
        self.widths.append(width)
        return len(self.widths) - 1

    def _pick(self):
        return self.draw.randrange(max(0, len(self.widths) - 4), len(self.widths))

    def _norm(self, width):
        return self.draw.choice([nn.BatchNorm2d, nn.BatchNorm2d, nn.Identity])(width)

    def _block(self, source, width_in, width, groups=1):
        kernel = self.draw.choice([1, 3])
        padding = self.draw.choice([0, 1]) if kernel == 3 and source is None else kernel // 2
        mode = self.draw.choice(["zeros", "zeros", "zeros", "reflect"])
        conv = nn.Conv2d(width_in, width, kernel, padding=padding, groups=groups,
                         bias=self.draw.random() < 0.5, padding_mode=mode)  # fmt: skip
        part = nn.Sequential(conv, self._norm(width), self.draw.choice(ACTIVATIONS)())
        return self._step(lambda m, x: m(x), [source], width, part)

    def _grow_conv(self):
        x = self._pick()
        self._block(x, self.widths[x], self.draw.choice([4, 6, 8, 12]))

    def _grow_grouped(self):
        x = self._pick()
        groups = self.draw.choice([g for g in (2, 3, 4) if self.widths[x] % g == 0] or [1])
        self._block(x, self.widths[x], groups * self.draw.choice([1, 2, 3]), groups)

    def _grow_depthwise(self):
        x = self._pick()
        width = self.widths[x]
        self._block(x, width, width * self.draw.choice([1, 1, 2]), width)

    def _grow_transposed(self):
        x = self._pick()
        width_in = self.widths[x]
        groups = self.draw.choice([g for g in (1, 2, width_in) if width_in % g == 0])
        kernel, stride, padding = self.draw.choice([(3, 1, 1), (1, 1, 0), (5, 1, 2)])
        width = groups * self.draw.choice([1, 2, 3])
        conv = nn.ConvTranspose2d(width_in, width, kernel, stride, padding, groups=groups,
                                  bias=self.draw.random() < 0.5)  # fmt: skip
        part = nn.Sequential(conv, self._norm(width), self.draw.choice(ACTIVATIONS)())
        self._step(lambda m, a: m(a), [x], width, part)

    def _grow_add(self):
        x, y = self._pick(), self._pick()
        if self.widths[x] != self.widths[y]:
            y = self._block(y, self.widths[y], self.widths[x])
        operation = self.draw.choice([lambda m, a, b: a + b, lambda m, a, b: a - b,
                                      lambda m, a, b: torch.maximum(a, b)])  # fmt: skip
        self._step(operation, [x, y], self.widths[x])

    def _grow_gate(self):
        x = self._pick()
        width = self.widths[x]
        squeeze, excite = nn.Conv2d(width, 3, 1), nn.Conv2d(3, width, 1)
        part = nn.Sequential(squeeze, nn.ReLU(), excite, nn.Sigmoid())
        self._step(lambda m, a: a * m(a.mean((2, 3), keepdim=True)), [x], width, part)

    def _grow_cat(self):
        chosen = sorted({self._pick(), self._pick(), self._pick()})
        self._step(lambda m, *maps: torch.cat(maps, 1), chosen, sum(self.widths[i] for i in chosen))

    def _grow_split(self):
        x = self._pick()
        width = self.widths[x]
        if width % 2:
            return
        norm = nn.BatchNorm2d(width // 2)

        def function(m, a):
            left, right = a.chunk(2, dim=1)
            return torch.cat([right, m(left)], 1)

        self._step(function, [x], width, norm)

    def _grow_slice(self):
        x = self._pick()
        width = self.widths[x] // 2 + 1
        self._step(lambda m, a: a[:, :width], [x], width)

    def _grow_shuffle(self):
        x = self._pick()
        width = self.widths[x]
        groups = 2 if width % 2 == 0 else 1

        def function(m, a):
            b, c, h, w = a.shape
            return a.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)

        self._step(function, [x], width)

    def _grow_statistics(self):
        x = self._pick()
        width = self.widths[x]
        if self.draw.random() < 0.5:
            groups = 2 if width % 2 == 0 else 1
            self._step(lambda m, a: m(a), [x], width, nn.GroupNorm(groups, width))
        else:
            norm = self.draw.choice([nn.LayerNorm, nn.RMSNorm])(width)
            part = nn.Sequential(norm, nn.Linear(width, width))
            self._step(lambda m, a: m(a.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), [x], width, part)

    def _grow_attention(self):
        x = self._pick()
        width = self.widths[x]
        heads = 2 if width % 2 == 0 else 1
        part = nn.ModuleDict(
            {"norm": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width),
             "out": nn.Linear(width, width)}
        )  # fmt: skip

        def function(m, a):
            b, c, h, w = a.shape
            tokens = a.flatten(2).transpose(1, 2)
            qkv = m["qkv"](m["norm"](tokens)).reshape(b, h * w, 3, heads, c // heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
            return a + m["out"](mixed).transpose(1, 2).reshape(b, c, h, w)

        self._step(function, [x], width, part)

    def _grow_pool(self):
        x = self._pick()
        pool = self.draw.choice([nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1),
                                 nn.AvgPool2d(3, 1, 1, count_include_pad=False)])  # fmt: skip
        self._step(lambda m, a: m(a), [x], self.widths[x], pool)

    def _grow_scale(self):
        x = self._pick()
        width = self.widths[x]
        gamma = nn.ParameterDict({"gamma": nn.Parameter(torch.randn(width, 1, 1))})
        self._step(lambda m, a: m["gamma"] * a, [x], width, gamma)

    def _grow_pad(self):
        x = self._pick()
        width = self.widths[x]
        self._step(lambda m, a: F.pad(a, (0, 0, 0, 0, 1, 2)), [x], width + 3)

    def _grow_inplace(self):
        x = self._pick()
        width = self.widths[x]

        def function(m, a):
            b = m(a)
            b += 1.5
            return F.relu(b, inplace=True)

        self._step(function, [x], width, nn.Conv2d(width, width, 1))


def close_channels(model, share, generator):
    """Close a share of all channels, now and then a whole layer; randomize everything else."""
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.3, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=generator)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.5
    for unit in prifu.filters(model).values():
        dead = bool(torch.rand((), generator=generator) < 0.1)
        open_ = (torch.rand(unit.weight.shape, generator=generator) >= share) & (not dead)
        weight = 0.08 + 0.04 * torch.rand(unit.weight.shape, generator=generator)
        unit.weight.data = torch.where(open_, weight, 0.0).to(unit.weight)
    return model.eval()
