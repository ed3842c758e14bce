"""`gptlab serve RUN…`: an API that OpenAI's clients speak and a page to talk to runs, on this machine."""

from __future__ import annotations

import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from gptlab.config.errors import ConfigError
from gptlab.generate.server.served import Served
from gptlab.generate.weights import for_generation
from gptlab.hardware.device import machine
from gptlab.runner.load import Loaded, load
from gptlab.runner.run import Run, find_study
from gptlab.study.compare import gather
from gptlab.study.votes import votes_file
from gptlab.tracker.console import console, say

EVERYWHERE = ("0.0.0.0", "::", "")  # all addresses of this machine, and none that a browser could be sent to
MOST_CONNECTIONS = 1_000
GRACE = 60  # seconds that answers may take to end when the server is to stop
SWITCH = 5e-4  # seconds after which the thread that writes answers lets the one that makes them go on; Python's own 5 ms are a whole step


def serve(
    runs: Sequence[str],
    *,
    host: str,
    port: int,
    token: str | None,
    allow_hosts: Sequence[str],
    rows: int | None,
    queue: int,
    threads: int | None,
    max_tokens: int,
    checkpoint: str,
    weights: str,
    device: str,
    precision: str,
) -> None:
    """Serve until Ctrl-C or SIGTERM, which let the answers that are under way end. Raises ConfigError for what cannot be served."""
    try:
        import uvicorn

        from gptlab.generate.server.app import create_app
        from gptlab.generate.server.fields import Limits
        from gptlab.generate.server.guard import is_local
    except ImportError as error:
        raise ConfigError(f"gptlab serve needs {error.name}, which is not installed; run `pip install 'gptlab[serve]'`") from error
    for name, value, least in (
        ("rows", 1 if rows is None else rows, 1),
        ("queue", queue, 1),
        ("threads", 1 if threads is None else threads, 1),
        ("max-tokens", max_tokens, 1),
    ):
        if value < least:
            raise ConfigError(f"--{name} {value} must be at least {least}")
    if token is not None and (len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token):
        raise ConfigError("--token must be at least 8 letters, digits or signs, without a space")
    if device.split(":")[0] not in machine().devices:
        raise ConfigError(f"--device {device}: this machine has {', '.join(machine().devices)}")
    local = is_local(host)
    if not local and token is None:
        token = secrets.token_urlsafe(24)
    listening = _listen(host, port)
    port = listening.getsockname()[1]
    models = [_served(one, checkpoint, weights, device, precision, rows, queue, threads) for one in dict.fromkeys(runs)]
    _tell_apart(models)
    app = create_app(
        models,
        votes=lambda a, b: votes_file(a.run, b.run),
        limits=Limits(tokens=max_tokens),
        hosts=[*allow_hosts, *([] if local else [host, socket.gethostname()])],
        local=local,
        token=token,
    )
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=GRACE,
    )
    server = uvicorn.Server(config)
    sys.setswitchinterval(SWITCH)
    # Before uvicorn listens to signals itself, and when all is done, since it then raises the one that ended it once more.
    signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
    shown = socket.gethostname() if host in EVERYWHERE else f"[{host}]" if ":" in host else host
    for served in models:
        about = f"{served.parameters:,} parameters, {f'chat format {served.format.name}' if served.format else 'continues text'}"
        say((served.name, "bold"), f"  {about}")
    say(f"http://{shown}:{port}/" + (f"#token={token}" if token else ""), ("  the page; the API is at /v1; Ctrl-C ends it", "dim"))
    if token:
        say(f"token: {token}")
    console.file.flush()
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        say("")


def _listen(host: str, port: int) -> socket.socket:
    """Raises ConfigError where the address cannot be had, before a model is loaded."""
    if not 0 <= port < 2**16:  # which getaddrinfo takes modulo 65,536
        raise ConfigError(f"--port {port} must be between 0 (a free one) and 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(512)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port} cannot be had ({error}); give another port, or 0 for a free one") from error
    return made


def _served(
    run: str, checkpoint: str, weights: str, device: str, precision: str, rows: int | None, queue: int, threads: int | None
) -> Served:
    loaded: Loaded = load(run, checkpoint=checkpoint, weights=weights, device=device)
    model = for_generation(loaded.model, precision)
    if loaded.run is None:
        stem = Path(run).stem
        return Served(stem, stem, model, loaded.tokenizer, rows=rows, queue=queue, threads=threads)
    found = loaded.run
    names = (found.identity, f"{found.study}/{found.directory.name}", run)
    return Served(found.directory.name, _label(found), model, loaded.tokenizer, names, found.identity, rows, queue, threads)


def _tell_apart(models: Sequence[Served]) -> None:
    """Give models of one name or label different ones."""
    for i, served in enumerate(models):
        if any(served.name == other.name for other in models[:i]):
            served.name = f"{served.name}-{i + 1}"
        if any(served.label == other.label for other in models[:i]):
            served.label = f"{served.label} ({served.run or i + 1})"


def _label(run: Run) -> str:
    """What a person calls a run: its arm, and its seed where the arm has several; the study, where that has one arm alone."""
    try:
        arms, _ = gather(find_study(run.study))
    except ConfigError:  # the study's list of members is gone
        return run.directory.name
    for arm in arms:
        for seed, own in {**arm.open, **arm.runs}.items():
            if own.identity == run.identity:
                name = arm.label if len(arms) > 1 else run.study
                return f"{name}, seed {seed}" if len(arm.open) + len(arm.runs) > 1 else name
    return run.directory.name
