"""A server in this process, with models so small that a token takes a fraction of a millisecond."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from gptlab import compose
from gptlab.config.registry import load_components
from gptlab.data.tokenizer import ByteTokenizer, Tokenizer
from gptlab.model.transformer import Transformer, new_model

WHY = "needs gptlab's extra `serve` (and openai and httpx of `dev`), which is not installed here"
httpx = pytest.importorskip("httpx", reason=WHY)
uvicorn = pytest.importorskip("uvicorn", reason=WHY)
pytest.importorskip("fastapi", reason=WHY)

from gptlab.generate.server.app import create_app  # noqa: E402 - after the skips
from gptlab.generate.server.fields import Limits  # noqa: E402
from gptlab.generate.server.served import Served  # noqa: E402

ROLES = tuple(f"<|{role}_{side}|>" for role in ("system", "user", "assistant") for side in ("start", "end"))


class Endless(ByteTokenizer):
    """Bytes, and no token that ends a text: one that is drawn with a random seed has as many tokens as are asked for."""

    end_of_text = None


class ChatTokenizer(Endless):
    """Bytes, and the tokens of a chat."""

    special: ClassVar[dict[str, int]] = {name: 257 + i for i, name in enumerate(ROLES)}
    vocabulary = 257 + len(ROLES)


def tiny_model(tokenizer: Tokenizer, *overrides: str, context: int = 32, seed: int = 0) -> Transformer:
    load_components()
    small = ["model.width=16", "model.heads=2", "model.depth=1", f"model.context_length={context}", "model.dropout=0"]
    made = new_model(compose([*small, *overrides]).model, tokenizer.vocabulary, seed)
    with torch.no_grad():  # far from the init, where all tokens are nearly as likely
        for i, parameter in enumerate(made.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * seed + i)))
    return made.eval()


def served(name: str = "tiny", *, chat: bool = False, slow: float = 0.0, seed: int = 0, **options: Any) -> Served:
    """`slow`: seconds that each step takes besides."""
    tokenizer: Any = options.pop("tokenizer", None) or (ChatTokenizer() if chat else Endless())
    model = tiny_model(tokenizer, seed=seed)
    if slow:
        model.register_forward_pre_hook(lambda *_: time.sleep(slow))
    return Served(name, options.pop("label", name.title()), model, tokenizer, run=options.pop("run", name), **options)


@contextlib.contextmanager
def serving(*models: Served, votes: Path = Path("votes.jsonl"), **options: Any) -> Iterator[str]:
    """The address of a server of these models."""
    app = create_app(models, votes=lambda a, b: votes, **options)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 20
        while not server.started and time.monotonic() < end:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def events(response: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, which must have its end."""
    lines = [line[6:] for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", lines[-1]
    return [json.loads(line) for line in lines[:-1]]


def until(what: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


__all__ = ["ROLES", "ChatTokenizer", "Limits", "events", "httpx", "served", "serving", "tiny_model", "until"]
