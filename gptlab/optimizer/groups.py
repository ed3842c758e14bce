"""Parameter groups by role: what a parameter is decides how it is updated, never its name."""

from __future__ import annotations

from typing import Any

from torch import nn

DECAYED = ("matrix", "embedding", "head")  # gains and biases have few values and a natural size: decay would only shrink them

Groups = list[dict[str, Any]]


def parameter_groups(model: nn.Module, roles: dict[str, str]) -> Groups:
    """One group a role: {"role", "params", "names"}, in a fixed order."""
    groups: dict[str, dict[str, Any]] = {}
    for path, parameter in model.named_parameters():
        group = groups.setdefault(roles[path], {"role": roles[path], "params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(path)
    return [groups[role] for role in sorted(groups)]


def torch_groups(groups: Groups, weight_decay: float) -> Groups:
    """The groups for a torch optimizer, with weight decay where the role has it."""
    return [{"params": g["params"], "weight_decay": weight_decay if g["role"] in DECAYED else 0.0} for g in groups]
