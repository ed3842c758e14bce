"""The other side of `gptlab bench train --against FOLDER`: nanoGPT's model in its own training loop, timed on request.

`python -m gptlab.cli.bench_peer JOB` reads a number of steps a line and answers with their seconds. The loop does what an
iteration of nanoGPT's train.py does: draw a batch, forward, draw the next, backward, clip, update, read the loss.
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

from gptlab.hardware.precision import autocast


def main() -> None:
    """Serve one job until standard input ends."""
    job: dict[str, Any] = json.loads(sys.argv[1])
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):  # it prints its size, and answers go there
        source = _load(Path(job["folder"]) / "model.py")
        device = torch.device(job["device"])
        model = source.GPT(source.GPTConfig(**job["model"])).to(device)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.type)
    context = job["model"]["block_size"]

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        tokens = np.memmap(job["tokens"], np.dtype(job["dtype"]), "r")
        starts = torch.randint(len(tokens) - context, (job["rows"],)).tolist()
        rows = [torch.from_numpy(tokens[s : s + context + 1].astype(np.int64)) for s in starts]
        return torch.stack([r[:-1] for r in rows]).to(device), torch.stack([r[1:] for r in rows]).to(device)

    waiting = draw()
    for line in sys.stdin:
        started = time.perf_counter()
        for _ in range(int(line)):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
            with autocast(device, job["precision"]):
                _, loss = model(*waiting)
            waiting = draw()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
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
