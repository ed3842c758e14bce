"""How the work is spread over devices."""

from __future__ import annotations

import torch
from torch import nn

from gptlab.config.registry import register


@register("hardware/strategy", "single")
class Single:
    """One process on one device."""

    def place(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model on the device."""
        return model.to(device)
