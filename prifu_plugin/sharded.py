"""Tensors that FSDP2 shards over processes, each of which holds some rows of W."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prifu_plugin.errors import OrderError


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which this process may hold a part only."""
    return hasattr(tensor, "placements")


def own_part(tensor: Any) -> Tensor:
    """Return what this process holds of a tensor, sharing its memory: all of it where unsharded."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return local


def own_rows(tensor: Tensor) -> slice:
    """Return the rows of a (C,) tensor that this process holds."""
    if not is_sharded(tensor):
        return slice(0, len(tensor))
    mesh, dim = _axis(tensor)
    size = -(-len(tensor) // mesh.size(dim))  # as torch.chunk: the last are shorter, or empty
    start = min(len(tensor), size * mesh.get_local_rank(dim))
    return slice(start, start + len(own_part(tensor)))


def whole(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return (C,) tensors with the rows of all processes, in one exchange for all of them.

    Args:
        tensors: sharded ones and others, which are returned as they are; the same on all
            processes, which must all call this.

    Returns:
        As many ordinary tensors.
    """
    found = list(tensors)
    sharded = [index for index, tensor in enumerate(found) if is_sharded(tensor)]
    by_kind: dict[tuple[Any, torch.dtype, torch.device], list[int]] = {}
    for index in sharded:
        mesh, dim = _axis(found[index])
        local = own_part(found[index])
        by_kind.setdefault((mesh.get_group(dim), local.dtype, local.device), []).append(index)
    for (group, dtype, device), members in by_kind.items():
        lengths = [len(found[index]) for index in members]
        rows = torch.zeros(sum(lengths), dtype=dtype, device=device)
        for part, index in zip(rows.split(lengths), members, strict=True):
            part[own_rows(found[index])] = own_part(found[index])
        dist.all_reduce(rows, group=group)
        for part, index in zip(rows.split(lengths), members, strict=True):
            found[index] = part
    return found


def summed(weights: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """Sum a number that belongs to each sharded tensor over the processes that share it.

    Args:
        weights: tensors, the same on all processes, which must all call this.
        values: one number for each; those of tensors that are not sharded are returned as they are.
    """
    found = list(values)
    by_group: dict[Any, list[int]] = {}
    for index, weight in enumerate(weights):
        if is_sharded(weight):
            mesh, dim = _axis(weight)
            by_group.setdefault((mesh.get_group(dim), values[index].device), []).append(index)
    for (group, _), members in by_group.items():
        sums = torch.stack([found[index].float() for index in members])
        dist.all_reduce(sums, group=group)
        for index, value in zip(members, sums, strict=True):
            found[index] = value
    return found


def check_unsharded(model: nn.Module, what: str) -> None:
    """Refuse what looks at whole weights on a model that processes share.

    Args:
        model: any module.
        what: the function that is called.

    Raises:
        OrderError: if a parameter is sharded.
    """
    path = next((name for name, p in model.named_parameters() if is_sharded(p)), None)
    if path is not None:
        raise OrderError(
            f"{what}: '{path}' is sharded by FSDP, and this process holds a part of it only. "
            "Gather the weights (torch.distributed.checkpoint.state_dict.get_model_state_dict with "
            "StateDictOptions(full_state_dict=True)), load them into a fresh wrapped model, and "
            "pass that one."
        )


def _axis(tensor: Any) -> tuple[Any, int]:
    """Return a DTensor's mesh and the dimension of it along which rows are shared out."""
    dims = [dim for dim, place in enumerate(tensor.placements) if place.is_shard(0)]
    others = [place for place in tensor.placements if not place.is_shard(0)]
    if len(dims) != 1 or not all(place.is_replicate() for place in others):
        raise OrderError(
            f"W is placed as {tuple(tensor.placements)}, and masks are decided for rows shared out "
            "once, as fully_shard does. Leave the filters out of other parallel plans."
        )
    return tensor.device_mesh, dims[0]
