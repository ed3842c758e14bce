"""Number formats: fp32, or bf16 and fp16 by autocast with fp32 weights; fp16 with a loss scaler."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """The context in which a forward pass runs."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """fp16's loss scaler; for the other formats one that does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
