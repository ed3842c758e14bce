"""`gptlab export --to hf|gguf|onnx`: a run in the form that other tools open."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from gptlab.config.errors import ConfigError, IOFailure
from gptlab.config.registry import component_of
from gptlab.interop.chat_template import template_of
from gptlab.interop.huggingface import CHAT_TEMPLATE, settings_of, shape_for, write_json
from gptlab.interop.shapes import exported
from gptlab.interop.tokenizers import tokenizer_json
from gptlab.runner import checkpoint as checkpoints
from gptlab.runner.export import DTYPES, cast
from gptlab.runner.load import Loaded, load
from gptlab.runner.run import Run

FORMATS = ("safetensors", "hf", "gguf", "onnx")
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
TURN_ENDS = ("<|im_end|>", "<|assistant_end|>", "<|eot_id|>", "</s>")  # special tokens that end an answer


@dataclass(frozen=True)
class Written:
    """What was written: the file or folder, its bytes, the shape it has there, the parameters, and how it is opened."""

    path: Path
    bytes: int
    shape: str
    parameters: int
    opens: str


def export_to(
    run: Run,
    to: str,
    output: Path | None = None,
    *,
    which: str = "latest",
    weights: str = "default",
    dtype: str = "fp32",
    force: bool = False,
) -> Written:
    """Write a run as `to`: `output`, or <the run's folder> here. Raises ConfigError for a component that the format cannot hold, or where
    something is there already (unless `force`); IOFailure when the disk fails. Nothing half-made stays.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to {to}: there is {', '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    suffix = "" if to == "hf" else f".{to}"
    path = output or Path(f"{run.directory.resolve().name}{suffix}")
    if path.exists() and not force:
        raise ConfigError(f"{path} is there already; --force replaces it, --output PATH writes another")
    if path.exists() and (to == "hf") != path.is_dir():
        raise ConfigError(f"{path} is a {'folder' if path.is_dir() else 'file'}; --output PATH writes another")
    if path.resolve() == run.directory.resolve():
        raise ConfigError(f"{path} is the run itself; --output PATH writes elsewhere")
    chosen = checkpoints.choose(run.checkpoints, which)
    loaded = load(run, checkpoint=str(chosen), weights=weights)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shape, opens = _write(loaded, partial, path, to, dtype, checkpoints.step_of(chosen))
        if path.is_dir():
            shutil.rmtree(path)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise IOFailure(f"{path} could not be written ({getattr(error, 'strerror', None) or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(missing_ok=True)
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size
    return Written(path, size, shape, sum(p.numel() for p in loaded.model.parameters()), opens)


def _write(loaded: Loaded, partial: Path, path: Path, to: str, dtype: str, step: int) -> tuple[str, str]:
    if to == "gguf":
        from gptlab.interop.gguf import write_gguf

        return write_gguf(loaded, partial, dtype), f"llama-cli -m {path} opens it"
    if to == "onnx":
        from gptlab.interop.onnx import write_onnx

        write_onnx(loaded, partial, dtype)
        return "ONNX", f"onnxruntime.InferenceSession({str(path)!r}).run(['logits'], {{'tokens': ids}}): (b, t) int64 -> (b, t, v)"
    shape = _write_folder(loaded, partial, dtype, step)
    return shape, f"AutoModelForCausalLM.from_pretrained({str(path)!r}) opens it; vllm serve {path} serves it"


def _write_folder(loaded: Loaded, folder: Path, dtype: str, step: int) -> str:
    model, tokenizer, run = loaded.config.model, loaded.tokenizer, loaded.run
    assert run is not None
    shape = shape_for(model)
    settings = settings_of(shape, model, tokenizer, TORCH_NAMES[dtype])
    weights = exported(shape, model, tokenizer.vocabulary, loaded.model.state_dict())
    written = tokenizer_json(tokenizer)
    folder.mkdir()
    save_file(
        {name: cast(name, tensor, dtype) for name, tensor in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    write_json(folder / "config.json", settings)
    write_json(folder / "tokenizer.json", written)
    write_json(folder / "tokenizer_config.json", _tokenizer_settings(tokenizer, model.context_length))
    ends = ends_of(tokenizer)
    write_json(folder / "generation_config.json", {"eos_token_id": ends, "bos_token_id": settings["bos_token_id"]} if ends else {})
    template = run.directory / CHAT_TEMPLATE
    if template.is_file():
        shutil.copyfile(template, folder / CHAT_TEMPLATE)
    elif (made := template_of(tokenizer)) is not None:
        (folder / CHAT_TEMPLATE).write_text(made, encoding="utf-8")
    (folder / "README.md").write_text(_card(loaded, run, shape.name, step), encoding="utf-8")
    return f"{shape.name}'s shape"


def ends_of(tokenizer: Any) -> list[int]:
    """Tokens that end a text or an answer."""
    special = getattr(tokenizer, "special", {})
    found = [tokenizer.end_of_text, *(special.get(name) for name in TURN_ENDS)]
    return list(dict.fromkeys(int(token) for token in found if token is not None))


def _tokenizer_settings(tokenizer: Any, context_length: int) -> dict[str, Any]:
    names = {number: token for token, number in getattr(tokenizer, "special", {}).items()}
    end = "<|endoftext|>" if tokenizer.name == "byte" else names.get(tokenizer.end_of_text)
    begin = names.get(getattr(tokenizer, "begin_of_text", None))
    found = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length, "clean_up_tokenization_spaces": False}
    return found | ({"eos_token": end} if end else {}) | ({"bos_token": begin} if begin else {})


def _card(loaded: Loaded, run: Run, shape: str, step: int) -> str:
    """The README.md of the folder: what the model is, and how it was made."""
    model, data = loaded.config.model, loaded.config.data
    note, environment = run.read("imported.json"), run.read("environment.json") or {}
    losses = [m["val/loss"] for m in run.metrics() if "val/loss" in m and int(m["step"]) <= step]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [gptlab]",
        "---",
        "",
        f"# {run.name}",
        "",
        f"A language model of {sum(p.numel() for p in loaded.model.parameters()):,} parameters in {shape}'s shape: width {model.width}, "
        f"depth {model.depth}, {model.heads} heads, context {model.context_length:,}, vocabulary {loaded.tokenizer.vocabulary:,}.",
        "",
        f"- written by gptlab {(environment.get('packages') or {}).get('gptlab', '')} from run `{run.identity}`, step {step:,}".replace(
            "  ", " "
        ),
    ]
    if note is not None:
        lines.append(f"- its weights were imported from `{note['source']}`")
    else:
        corpus = component_of(data.corpus).name
        lines.append(f"- trained on `data/corpus={corpus}`, {loaded.config.trainer.budget}")
    if losses:
        lines.append(f"- held-out loss {losses[-1]:.4f} nats a token")
    return "\n".join([*lines, ""])
