"""Parameter groups by role: what a parameter is decides how it is updated, never its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from gptlab.config.errors import ConfigError
from gptlab.config.registry import suggest

ROLES = ("matrix", "embedding", "head", "gain", "bias")
DECAYED = ("matrix", "embedding", "head")  # gains and biases have few values and a natural size: decay would only shrink them

Groups = list[dict[str, Any]]


def parameter_groups(model: nn.Module, roles: Mapping[str, str], widening: Mapping[str, float] | None = None) -> Groups:
    """One group a role: {"role", "params", "names", "parts", "widening"}, in a fixed order; of the parameters that are trained.

    `parts`: the rows of each product that a matrix fuses. `widening` (of a parameter's path; 1): how many times more terms its
    product sums than at the width that the optimizer's rate is meant for; a role that has several has a group for each.
    """
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for path, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role, wider = roles[path], (widening or {}).get(path, 1.0)
        group = groups.setdefault((role, wider), {"role": role, "params": [], "names": [], "parts": [], "widening": wider})
        fused: Mapping[str, int] = getattr(model.get_submodule(path.rpartition(".")[0]), "parts", {}) if parameter.dim() == 2 else {}
        group["params"].append(parameter)
        group["names"].append(path)
        group["parts"].append(list(fused.values()) or [parameter.shape[0]])
    return [groups[key] for key in sorted(groups)]


def torch_groups(
    groups: Groups,
    learning_rate: float,
    weight_decay: float,
    rates: Mapping[str, float],
    decays: Mapping[str, float],
    *,
    wider: float | None = None,
) -> Groups:
    """The groups for a torch optimizer, each with its rate and weight decay.

    `rates`: role -> factor of the learning rate (1); `decays`: role -> weight decay (`weight_decay` where the role has it, else 0).
    `wider`: the power of a group's `widening` that its rate is divided by and its decay, which the rate multiplies, is multiplied by.
    It is 1 for updates whose entries have one size whatever the gradient's, as Adam's and Lion's (Yang et al., 2022); 0 for those
    that are right at any width; None where nobody has worked it out.
    Raises ConfigError for a role that is none, a rate no optimizer can use, and a wider model without a rule.
    """
    check_rates(learning_rate, weight_decay)
    for option, values in (("rates", rates), ("decays", decays)):
        for role, value in values.items():
            if role not in ROLES:
                raise ConfigError(f"optimizer.{option}.{role}: no such role{suggest(role, ROLES)}; there are {', '.join(ROLES)}")
            if not 0 <= value < float("inf"):
                raise ConfigError(f"optimizer.{option}.{role}={value} must be at least 0 and finite")
    found = []
    for group in groups:
        if wider is None and group.get("widening", 1.0) != 1:
            raise ConfigError(
                "model/parametrisation=mup has no rule for this optimizer's rates; use optimizer=adamw, schedule_free, lion or muon, "
                "or model/parametrisation=standard"
            )
        factor = group.get("widening", 1.0) ** (wider or 0.0)
        decay = decays.get(group["role"], weight_decay if group["role"] in DECAYED else 0.0)
        rate = learning_rate * rates.get(group["role"], 1.0)
        found.append({"params": group["params"], "lr": rate / factor, "weight_decay": decay * factor, "role": group["role"]})
    return found


def check_rates(learning_rate: float, weight_decay: float) -> None:
    """Raise ConfigError for a rate no optimizer can use."""
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not 0 <= value < float("inf"):
            raise ConfigError(f"optimizer.{name}={value} must be at least 0 and finite")


def check_shares(**values: float) -> None:
    """Raise ConfigError for a momentum or decay of a running mean that is not in [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ConfigError(f"optimizer.{name}={value} must be in [0, 1)")
