"""A run as an ONNX graph: tokens (b, t) in, logits (b, t, v) out, for any batch and any length up to the context."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gptlab.config import codec
from gptlab.config.errors import ConfigError
from gptlab.data.tokenizer import to_json
from gptlab.model.transformer import Transformer
from gptlab.runner.export import DTYPES
from gptlab.runner.load import Loaded


class _Logits(nn.Module):
    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        logits: Tensor = self.model(tokens).float()
        return logits


def write_onnx(loaded: Loaded, file: Path, dtype: str) -> None:
    """Write the graph with its weights; the run's config and tokeniser stand in its metadata, as `gptlab.config` and `gptlab.tokenizer`.

    Raises ConfigError where the exporter is not installed, or a component cannot be traced.
    """
    for name in ("onnx", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--to onnx needs {name}: pip install 'gptlab[interop]'")
    model = loaded.model.to(DTYPES[dtype]).eval()
    tokens = torch.zeros((2, min(8, model.config.context_length)), dtype=torch.int64)
    b, t = torch.export.Dim("b"), torch.export.Dim("t", max=model.config.context_length)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Logits(model),
                (tokens,),
                input_names=["tokens"],
                output_names=["logits"],
                dynamic_shapes={"tokens": {0: b, 1: t}},
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # the exporter raises of its own
        raise ConfigError(f"this model cannot be traced to ONNX ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from error
    assert program is not None
    told = {"config": codec.to_json(loaded.config), "tokenizer": to_json(loaded.tokenizer)}
    program.model.metadata_props.update({f"gptlab.{key}": json.dumps(value) for key, value in told.items()})
    program.save(str(file), external_data=False)
