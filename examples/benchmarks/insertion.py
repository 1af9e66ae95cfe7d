"""Compare ways to put a filter behind a normalization layer, by what users need to keep.

    python examples/benchmarks/insertion.py     # prints the table of docs/design.md

Each way is the obvious implementation, on timm's test_resnet and, for the fused activation, on
test_efficientnet; each column is a check that runs.
"""

import copy
import pickle

import timm
import torch
from torch import fx, nn

import prifu_plugin as prifu
from prifu_plugin.filter import PriFU
from prifu_plugin.graph.capture import ModelTracer
from prifu_plugin.graph.sites import norm_modules


def closing(channels, dim=1):
    """Return a filter with its first channel closed."""
    unit = PriFU(channels, dim=dim)
    unit.weight.data[0] = 0.0
    return unit


def slot(model):
    """Replace the norm by a container of the norm and the filter."""
    for path, norm in list(norm_modules(model)):
        model.set_submodule(path, nn.Sequential(norm, closing(norm.num_features)))
    return model


def multiply(module, inputs, output):
    """Filter the output of a hooked norm."""
    return module.unit(output)


def hook(model):
    """Add the filter as a child and multiply in a forward hook."""
    for _, norm in list(norm_modules(model)):
        norm.unit = closing(norm.num_features)
        norm.register_forward_hook(multiply)
    return model


def graph(model):
    """Trace the whole model and insert calls of filters into a GraphModule."""
    traced = fx.GraphModule(model, ModelTracer().trace(model))
    for node in list(traced.graph.nodes):
        paths = dict(norm_modules(model))
        if node.op == "call_module" and str(node.target) in paths:
            norm = paths[str(node.target)]
            name = f"{node.target}_prifu"
            traced.add_submodule(name, closing(norm.num_features))
            with traced.graph.inserting_after(node):
                call = traced.graph.call_module(name, (node,))
            node.replace_all_uses_with(call, delete_user_cb=lambda user, c=call: user is not c)
    traced.recompile()
    return traced


def host(model):
    """Do what prifu_plugin does: a child, and a subclass with the same name as the norm's."""
    model = prifu.wrap(model, preserve=False, inplace=True)
    for unit in prifu.filters(model).values():
        unit.weight.data[0] = 0.0
    return model


def checks(way):
    """Yield (what users need, whether it holds) for one way."""
    x = torch.randn(2, 3, 64, 64)
    original = timm.create_model("test_resnet", num_classes=2).eval()
    model = way(copy.deepcopy(original)).eval()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    sync = nn.SyncBatchNorm.convert_sync_batchnorm
    yield "class of the model", lambda: type(model) is type(original)
    yield "isinstance of norms", lambda: isinstance(model.bn1, nn.BatchNorm2d)
    yield "original checkpoint", lambda: not model.load_state_dict(original.state_dict())[0]
    yield (
        "forward_features",
        lambda: not torch.equal(model.forward_features(x), original.forward_features(x)),
    )
    yield "deepcopy", lambda: torch.equal(copy.deepcopy(model)(x), model(x))
    yield "pickle", lambda: torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))
    yield "compile fullgraph", lambda: torch.allclose(compiled(x), model(x), atol=1e-5)
    yield (
        "SyncBatchNorm",
        lambda: torch.allclose(sync(copy.deepcopy(model)).eval()(x), model(x), atol=1e-5),
    )
    fused = way(nn.Sequential(timm.layers.BatchNormAct2d(2, act_layer=nn.SiLU))).eval()
    expected = nn.functional.silu(0.1 * x[:, 1] / (1 + 1e-5) ** 0.5)
    yield (
        "before fused activation",
        lambda: torch.allclose(fused(x[:, :2])[:, 1], expected, atol=1e-6),
    )


def holds(check):
    """Run a check; an exception is a no."""
    try:
        return bool(check())
    except Exception:  # noqa: BLE001 - a way that cannot do it has failed the check
        return False


def main():
    """Print the table."""
    ways = {
        "container in the slot": slot,
        "forward hook": hook,
        "GraphModule": graph,
        "hosting subclass": host,
    }
    rows = {name: {what: holds(check) for what, check in checks(way)} for name, way in ways.items()}
    print("| what users keep | " + " | ".join(rows) + " |")
    print("|---|" + "---|" * len(rows))
    for what in next(iter(rows.values())):
        cells = ["yes" if row[what] else "no" for row in rows.values()]
        print(f"| {what} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
