"""Number formats: fp32; bf16 and fp16 by autocast with fp32 weights, fp16 with a loss scaler; fp8 products; bf16 throughout."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from gptlab.hardware.fp8 import fp8_linear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16, "bf16_pure": torch.bfloat16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """The context in which a forward pass runs."""
    if precision in ("fp32", "bf16_pure"):  # the weights' own format
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """fp16's loss scaler; for the other formats one that does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """A freshly drawn model in the format of `precision`: bf16_pure rounds its parameters, fp8 changes its layers' products.

    A layer takes part in fp8 that has an attribute `product`; embeddings and the head stay in bf16. Buffers keep their format: angles
    in bf16 would turn far positions wrongly.
    """
    if precision == "bf16_pure":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    if precision == "fp8":
        for module in model.modules():
            layer: Any = module
            if hasattr(layer, "product"):
                layer.product = fp8_linear
    return model
