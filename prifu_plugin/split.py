"""Cut a model in two: the edge computes what is uploaded, the cloud finishes the job."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from prifu_plugin.arguments import check_model
from prifu_plugin.claims import claim_of, guard, shown
from prifu_plugin.cut import CutFilter
from prifu_plugin.cuts import (
    ancestors,
    captured_at,
    crossing,
    find,
    is_free,
    late_inputs,
    on_edge,
    points,
    suggestion,
    warn_of_what_is_lost,
    with_sizes,
)
from prifu_plugin.device import device_of
from prifu_plugin.errors import CaptureError, ConfigError, OrderError, PrifuWarning
from prifu_plugin.graph.guards import SPLIT_GUARD, is_guard
from prifu_plugin.graph.host import filter_of, is_host
from prifu_plugin.graph.undisturbed import undisturbed
from prifu_plugin.graph.values import check_present
from prifu_plugin.names import value_at
from prifu_plugin.prune.inputs import Inputs, suited
from prifu_plugin.prune.plain import is_compiled
from prifu_plugin.prune.quiet import DrawingAlike, Quiet
from prifu_plugin.prune.run import plan_of
from prifu_plugin.prune.seen import seen
from prifu_plugin.prune.verify import TOLERANCES, difference


@dataclass(frozen=True)
class Payload:
    """What is uploaded for one input.

    Attributes:
        shape: of one sample.
        dtype: of its numbers.
        bytes: of one sample as it is.
        varying: channels that differ between the samples that were looked at, (C,).
    """

    shape: tuple[int, ...]
    dtype: str
    bytes: int
    varying: Tensor


@dataclass(frozen=True)
class Split:
    """A model cut in two; `cloud(edge(x))` is `model(x)`.

    Both parts call the model's own modules: training one trains the model.

    Attributes:
        edge: input -> upload.
        cloud: upload -> output.
        at: node of the graph that is uploaded.
        filtered_dim: channel dimension of the filter that the upload comes from, if it does.
    """

    edge: fx.GraphModule
    cloud: fx.GraphModule
    at: str
    filtered_dim: int | None = None

    def __iter__(self) -> Iterator[fx.GraphModule]:
        """Yield edge and cloud, so that `edge, cloud = split(...)` works."""
        return iter((self.edge, self.cloud))

    def payload(self, x: Tensor, dim: int | None = None) -> Payload:
        """Describe the upload for a batch of at least two different inputs, in eval mode.

        Args:
            x: the batch.
            dim: channel dimension of the upload; by default that of a filter on it, else the last
                of tokens (N, T, C) and 1 of everything else.

        Raises:
            ConfigError: for one input, or where several tensors are uploaded.
        """
        if not isinstance(x, Tensor) or len(x) < 2:
            raise ConfigError(
                "payload looks at which channels differ between inputs: pass a batch (N, ...) of "
                "at least two different ones."
            )
        with undisturbed(self.edge), torch.no_grad():
            z = self.edge.eval()(x.to(device_of(self.edge), copy=True))
        if not isinstance(z, Tensor):
            raise ConfigError(
                f"The upload at '{self.at}' is {len(z)} tensors, which have no single payload: "
                "look at each of edge(x)."
            )
        dim = self._dim(z) if dim is None else dim
        if not isinstance(dim, int) or not -z.ndim < dim < z.ndim or not dim:
            raise ConfigError(
                f"dim={dim!r} is no channel dimension of an upload {tuple(z.shape)}: pass 1 for "
                "(N, C, ...) or -1 for (N, ..., C)."
            )
        lines = z.movedim(dim, -1).reshape(len(z), -1, z.shape[dim])
        varying = (lines.amax(0) - lines.amin(0) > 0).any(0)
        name = str(z.dtype).removeprefix("torch.")
        return Payload(tuple(z.shape[1:]), name, z[0].numel() * z.element_size(), varying)

    def _dim(self, z: Tensor) -> int:
        if self.filtered_dim is not None:
            return self.filtered_dim
        return -1 if z.ndim == 3 else 1


def split(
    model: nn.Module,
    at: str,
    example_inputs: Tensor | tuple[Tensor, ...] | None = None,
    *,
    several: bool = False,
) -> Split:
    """Cut a plain, wrapped or pruned model behind a module or a node of its graph.

    Args:
        model: traced in eval mode; its modules are shared, not copied.
        at: path of a module, name from timm's feature_info, or name of a graph node.
        example_inputs: a batch; needed unless the model was run wrapped or has a pretrained_cfg.
        several: upload several tensors where one is not enough, as a tuple.

    Returns:
        Edge and cloud, in the mode the model is in; what it computes in eval mode only, since that
        is what is traced: functional dropout is off, with a `PrifuWarning` for a model in training.

    Raises:
        NoSiteError: if there is no such place; the message names the closest.
        ConfigError: if more than one tensor crosses the cut and `several` is not set, or the
            example inputs are refused.
        CaptureError: if the model cannot be traced, or the parts, which are run once, compute
            something else than it does.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> edge, cloud = split(net, "1", torch.zeros(2, 3, 8, 8))
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.equal(cloud(edge(x)), net(x))
        True
    """
    check_model(model)
    check_present(model)
    _check_not_compiled(model)
    if not isinstance(at, str):
        raise ConfigError(f"at={at!r}: pass the path of a module, or the name of a graph node.")
    inputs = Inputs.for_model(model, example_inputs)
    captured = captured_at(model, inputs)
    node = find(captured, model, at)
    graph = captured.graph
    computed = on_edge(graph, node)
    warn_of_what_is_lost(model, graph, node, computed)
    known = with_sizes(graph, computed)
    crosses = crossing(graph, known)
    tensors = [n for n in crosses if seen(n).shape]
    sizes = [n for n in crosses if not seen(n).shape]
    if tensors != [node] and not several:
        others = [n.name for n in tensors if n is not node]
        raise ConfigError(
            f"The cut at '{at}' lets {', '.join(others)} past '{node.name}': a residual stream or "
            f"branch goes around it. Cut at {suggestion(graph)}, or pass several=True to upload "
            "all of them."
        )
    filtered = _filtered_dim(model, node, at)
    if filtered is not None and tensors != [node]:
        others = [n.name for n in tensors if n is not node]
        warnings.warn(
            f"Only what crosses at '{at}' is filtered and noisy; {', '.join(others)} is uploaded "
            f"as it is. Cut at {suggestion(graph)}, and wrap with the filter there.",
            PrifuWarning,
            stacklevel=2,
        )
    edge, cloud = fx.Graph(), fx.Graph()
    claims = _copy_cloud(graph, known, cloud, tensors, sizes)
    _copy_edge(graph, computed, edge, tensors, claims)
    parts = []
    with undisturbed(model):  # building a GraphModule sets modes
        for part, name in ((edge, "Edge"), (cloud, "Cloud")):
            parts.append(fx.GraphModule(_members(model, part), part, class_name=name))
    for shell in parts:
        for module in shell.modules():
            if isinstance(module, fx.GraphModule) or type(module) is nn.Module:
                module.training = model.training
    halves = Split(parts[0], parts[1], node.name, filtered)
    _check(model, halves, inputs)
    return halves


def _filtered_dim(model: nn.Module, node: fx.Node, at: str) -> int | None:
    """Return the channel dimension of the filter at the cut, None if there is, or was, none."""
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    unit = module if module is None or not is_host(module) else filter_of(module)
    if isinstance(unit, CutFilter):
        return unit.dim
    try:
        recipe = plan_of(model).recipe
    except ConfigError:  # it was not pruned
        return None
    return int(recipe["cut_dim"]) if recipe["cut"] == at else None


def cut_points(model: nn.Module, example_inputs: Any = None) -> list[str]:
    """List the nodes at which a model can be cut so that one tensor is uploaded.

    Example:
        >>> cut_points(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.zeros(2, 3, 8, 8))
        ['_0']
    """
    check_model(model)
    check_present(model)
    _check_not_compiled(model)
    inputs = Inputs.for_model(model, example_inputs)
    return points(captured_at(model, inputs).graph)


def _copy_edge(
    graph: fx.Graph,
    computed: set[fx.Node],
    edge: fx.Graph,
    tensors: list[fx.Node],
    claims: dict[fx.Node, Any],
) -> None:
    """Copy what the edge computes; it refuses inputs for which the cloud would take other sizes."""
    computed = computed.union(*(ancestors(node) for node in claims))
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in computed or node.op == "placeholder":
            copies[node] = edge.node_copy(node, lambda n: copies[n])
            if is_guard(node):
                copies[node].update_arg(1, SPLIT_GUARD)
    for node, claim in claims.items():
        guard(edge, copies[node], claim, copies)
    results = tuple(copies[n] for n in tensors)
    edge.output(results[0] if len(results) == 1 else results)


def _copy_cloud(
    graph: fx.Graph,
    known: set[fx.Node],
    cloud: fx.Graph,
    tensors: list[fx.Node],
    sizes: list[fx.Node],
) -> dict[fx.Node, Any]:
    """Copy the rest; return what it takes sizes for that the edge knew."""
    claims: dict[fx.Node, Any] = {}
    late = late_inputs(graph, known)
    if late:
        raise ConfigError(
            f"The input '{late[0].name}' is used behind the cut only: a split model takes all of "
            "its inputs on the edge. Cut further on, or upload it yourself."
        )
    copies: dict[fx.Node, Any] = {}
    if len(tensors) == 1:
        upload = cloud.placeholder(tensors[0].name)
        # The caller's tensor must survive a cloud that begins in place.
        copies[tensors[0]] = cloud.call_method("clone", (upload,))
    else:
        upload = cloud.placeholder("upload")
        for place, node in enumerate(tensors):
            sent = cloud.call_function(operator.getitem, (upload, place))
            copies[node] = cloud.call_method("clone", (sent,))
    for node in sizes:
        copies[node] = _size(cloud, node, copies, claims)
    needed = {n for n in graph.nodes if n not in known}
    needed |= {source for n in list(needed) for source in _free_before(n)}
    for node in graph.nodes:
        if node in copies or node not in needed or node.op == "placeholder":
            continue
        copied = cloud.create_node(
            node.op,
            node.target,
            fx.node.map_arg(node.args, lambda n: copies[n]),
            fx.node.map_arg(node.kwargs, lambda n: copies[n]),
            node.name,
        )
        copies[node] = copied
    return claims


def _free_before(node: fx.Node) -> set[fx.Node]:
    """Return the parameters, and what is made of them alone, that a node reads."""
    found: set[fx.Node] = set()
    open_nodes = [s for s in node.all_input_nodes if is_free(s)]
    while open_nodes:
        at = open_nodes.pop()
        found.add(at)
        open_nodes += [s for s in at.all_input_nodes if s not in found]
    return found


def _size(
    cloud: fx.Graph, node: fx.Node, copies: dict[fx.Node, Any], claims: dict[fx.Node, Any]
) -> Any:
    """Give the cloud a size that the edge knew: always the same, the upload's, or made of such."""
    tensors = [n for n in copies if seen(n).shape]
    claim = claim_of(seen(node).example, seen(node).other_example, tensors)
    if claim is not None:
        claims[node] = claim
        return shown(cloud, claim, copies)
    sources = node.all_input_nodes
    if sources and all(not seen(source).shape for source in sources):
        made = {source: _size(cloud, source, copies, claims) for source in sources}
        args = fx.node.map_arg(node.args, lambda n: made[n])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: made[n])
        return cloud.create_node(node.op, node.target, args, kwargs)
    raise CaptureError(
        f"Behind the cut the model uses '{node.name}', a size that the upload does not show. Cut "
        "elsewhere, or let the model compute it from a number that is fixed."
    )


def _check_not_compiled(model: nn.Module) -> None:
    if is_compiled(model):
        raise OrderError(
            f"{type(model).__name__} is what torch.compile made of a model: pass the model itself "
            "(its _orig_mod), and compile the halves."
        )


def _check(model: nn.Module, halves: Split, inputs: Inputs) -> None:
    """Raise CaptureError if the halves do not compute what the model does, in eval mode."""
    shell = nn.ModuleList([model, *halves])
    with undisturbed(shell), Quiet(model), torch.no_grad():
        shell.eval()
        drawn = (suited(model, inputs.batch(2), inputs) or inputs).draw(model, 0)
        drawn = [x.to(device_of(model)) for x in drawn]
        with DrawingAlike(device_of(model)):
            expected = model(*(x.clone() for x in drawn))
            found = halves.cloud(halves.edge(*drawn))
    gap = difference(expected, found)
    if gap != gap:
        warnings.warn(
            f"{type(model).__name__} returns no finite number for the inputs its parts were tried "
            "on, so that nothing was compared: look at its weights and statistics.",
            PrifuWarning,
            stacklevel=3,
        )
    if gap > TOLERANCES[torch.float32]:
        raise CaptureError(
            f"The parts of {type(model).__name__} compute something else than it does ({gap:.1e} "
            "of the largest output): its forward does what a graph does not show, as hooks on the "
            "model itself, writing through views, or asking for types do. Move that into a module "
            "inside, or write it out of place."
        )


def _members(model: nn.Module, graph: fx.Graph) -> dict[str, Any]:
    members = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            members[str(node.target)] = value_at(model, str(node.target))
    return members
