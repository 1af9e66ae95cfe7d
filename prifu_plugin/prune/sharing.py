"""Weights that several layers share: slices of them are several, which the report says."""

from __future__ import annotations

from torch import nn

from prifu_plugin.names import WHOLE


def separated(model: nn.Module, pruned: nn.Module) -> list[tuple[str, str]]:
    """Return a note for each weight that layers of a model share and those of the result do not.

    Example:
        >>> one, other = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> tied = nn.Sequential(one, other)
        >>> other.weight = one.weight
        >>> separated(tied, nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))[0][0]
        '0.weight'
    """
    paths: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(path)
    after = dict(pruned.named_parameters(remove_duplicate=False))
    notes = []
    for shared in paths.values():
        there = {id(after[path]) for path in shared if path in after}
        if len(there) > 1:
            others = ", ".join(f"'{path}'" for path in shared[1:])
            notes.append((shared[0], f"shared with {others}, and separate in the pruned model"))
    names: dict[int, list[str]] = {}
    for path, parameter in after.items():
        names.setdefault(id(parameter), []).append(path)
    alone = [paths[0] for paths in names.values() if len(paths) == 1]
    why = "read by the forward too, beside its layer, and separate in the pruned model"
    return notes + [(path, why) for path in alone if path.endswith(WHOLE)]
