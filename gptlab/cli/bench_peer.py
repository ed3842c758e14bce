"""The other side of `gptlab bench train --against FOLDER`: nanoGPT's model in its own training loop, timed on request.

`python -m gptlab.cli.bench_peer JOB` reads a number of steps a line and answers with their seconds. The loop does what an
iteration of nanoGPT's train.py does: for each micro-batch forward, draw the next, backward; clip, update, read every tenth loss.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptlab.hardware.device import synchronise
from gptlab.hardware.precision import autocast, scaler

LOG_INTERVAL = 10  # nanoGPT's default: how often it waits for a loss


def main() -> None:
    """Serve one job until standard input ends."""
    job: dict[str, Any] = json.loads(sys.argv[1])
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):  # it prints its size, and answers go there
        source = _load(Path(job["folder"]) / "model.py")
        device = torch.device(job["device"])
        model = source.GPT(source.GPTConfig(**job["model"])).to(device)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.type)
    if job["compile"]:
        model = torch.compile(model)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, which nanoGPT allows
    scale = scaler(device, job["precision"])
    context, micro_batches = job["model"]["block_size"], job["micro_batches"]

    def move(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens.to(device)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        tokens = np.memmap(job["tokens"], np.dtype(job["dtype"]), "r")
        starts = torch.randint(len(tokens) - context, (job["rows"],)).tolist()
        rows = [torch.from_numpy(tokens[s : s + context + 1].astype(np.int64)) for s in starts]
        return move(torch.stack([r[:-1] for r in rows])), move(torch.stack([r[1:] for r in rows]))

    waiting = draw()
    for line in sys.stdin:
        started = time.perf_counter()
        for number in range(int(line)):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
            for _ in range(micro_batches):
                with autocast(device, job["precision"]):
                    _, loss = model(*waiting)
                    loss = loss / micro_batches
                waiting = draw()
                scale.scale(loss).backward()
            scale.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scale.step(optimizer)
            scale.update()
            optimizer.zero_grad(set_to_none=True)
            if number % LOG_INTERVAL == 0:
                loss.item()
        synchronise(device)
        print(time.perf_counter() - started, flush=True)


def _load(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
