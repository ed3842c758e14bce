"""`gptlab serve` as a process: SIGTERM lets streams end, other addresses take a token, votes come to the study."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptlab import compose, train
from gptlab.config.compose import settings
from gptlab.study.compare import compare
from gptlab.study.votes import votes_file
from tests.cli.conftest import Command, finish, start
from tests.tiny import tiny

pytest.importorskip("fastapi", reason="needs gptlab's extra `serve`")
httpx = pytest.importorskip("httpx", reason="needs httpx, of gptlab's extra `dev`")


@pytest.fixture
def runs(corpus_file: Path) -> list[str]:
    found = []
    for norm in ("layernorm", "rmsnorm"):
        own = [f"model/norm={norm}"]
        outcome = train(compose([*tiny(corpus_file, "study=arms", steps=2), *own]), settings=settings(own)).run
        assert outcome is not None
        found.append(outcome.identity)
    return found


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Any]:
    """`served("RUN", "--port", "0")`: the process, and the address that it prints."""
    begun: list[subprocess.Popen[str]] = []

    def serve(*arguments: str) -> tuple[subprocess.Popen[str], str]:
        process = start("serve", *arguments, folder=tmp_path)
        begun.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.match(r"(http://\S+)", line):
                return process, found[1]
        raise AssertionError(process.communicate()[1])

    yield serve
    for process in begun:
        process.kill()
        process.communicate()


def test_sigterm_lets_streams_end_and_takes_no_new_request(runs: list[str], served: Any) -> None:
    process, address = served(runs[0], "--port", "0")
    with (
        httpx.Client(timeout=60) as client,
        client.stream(
            "POST",
            f"{address}v1/completions",
            json={"prompt": "the ", "max_tokens": 1500, "stream": True, "stream_options": {"include_usage": True}},
        ) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}v1/models")
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["usage"]["completion_tokens"] == 1500
    done = finish(process, 30)
    assert (done.code, done.err) == (0, "")


@pytest.mark.slow
def test_ctrl_c_ends_it_without_a_trace(runs: list[str], served: Any) -> None:
    process, address = served(runs[0], "--port", "0")
    assert httpx.get(address).status_code == 200
    process.send_signal(signal.SIGINT)
    done = finish(process, 30)
    assert (done.code, done.err) == (0, "")


def test_another_address_takes_a_token_which_is_made_up_and_printed(runs: list[str], served: Any) -> None:
    _, address = served(runs[0], runs[0], "--host", "0.0.0.0", "--port", "0")  # the same twice is served once
    where, token = re.fullmatch(r"http://[^:/]+:(\d+)/#token=(\S+)", address).groups()  # type: ignore[union-attr]
    assert len(token) > 30
    assert httpx.get(f"http://127.0.0.1:{where}/v1/models").status_code == 401
    told = httpx.get(f"http://127.0.0.1:{where}/v1/models", headers={"Authorization": f"Bearer {token}"})
    assert [model["label"] for model in told.json()["data"]] == ["layernorm"]


def test_votes_come_to_the_study_and_into_its_comparison(runs: list[str], served: Any, gptlab: Command) -> None:
    _, address = served(*runs, "--port", "0")
    models = httpx.get(f"{address}v1/models").json()["data"]
    assert [model["label"] for model in models] == ["layernorm", "rmsnorm"]
    for vote in ("rms", "rms", "tie"):
        pair = httpx.post(f"{address}v1/blind", json={}).json()["pair"]
        for side in ("a", "b"):
            body = {"model": f"blind-{pair}-{side}", "prompt": "the ", "max_tokens": 3}
            assert httpx.post(f"{address}v1/completions", json=body).status_code == 200
        # The server alone knows who is who: a vote for a fixed side would be for either. The file tells.
        done = httpx.post(f"{address}v1/votes", json={"pair": pair, "vote": "tie" if vote == "tie" else "a"}).json()
        assert {done["a"]["label"], done["b"]["label"]} == {"layernorm", "rmsnorm"}
    file = votes_file(*runs)
    assert file.parent.name == "arms"
    (tally,) = compare("arms").votes
    assert (tally.arm, tally.against, tally.votes, tally.ties) == ("rmsnorm", "layernorm", 3, 1)
    shown = gptlab("compare", "arms").out
    assert "votes on blind pairs" in shown
    assert "rmsnorm against" in shown


def test_what_cannot_be_served_is_refused_in_a_sentence(runs: list[str], gptlab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: pytest.fail("it was served"))
    for arguments, told in (
        (["--rows", "0"], "--rows 0 must be at least 1"),
        (["--queue", "0"], "--queue 0 must be at least 1"),
        (["--max-tokens", "0"], "--max-tokens 0 must be at least 1"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
        (["--token", "short"], "--token must be at least 8"),
        (["--device", "tpu"], "--device tpu: this machine has"),
        (["--port", "99999"], "--port 99999 must be between 0"),
        (["--host", "203.0.113.7", "--port", "0"], "--host 203.0.113.7 --port 0 cannot be had"),
        (["--precision", "fp64"], "--precision fp64 is not one of"),
    ):
        found = gptlab("serve", runs[0], "--port", "0", *arguments)
        assert (found.code, found.out) == (2, ""), arguments
        assert told in " ".join(found.err.split())
    assert gptlab("serve", "nothing").code == 2


def test_a_server_is_timed_by_clients_of_its_own(runs: list[str], gptlab: Command) -> None:
    asked = ["--clients", "3", "--tokens", "5", "--rounds", "1", "--requests", "10"]
    told = json.loads(gptlab("bench", "serve", runs[0], *asked, "--json").out)
    (found,) = told["rounds"]
    assert found["whole"] == 3
    assert 0 < found["fastest"] <= found["slowest"]
    assert 0 < found["first"] <= 5 / found["alone"]
    assert len(told["memory"]) in (0, 11)
    refused = gptlab("bench", "serve", "nothing", *asked)
    assert (refused.code, "no run matches 'nothing'" in refused.err) == (2, True)
    assert gptlab("bench", "serve", runs[0], "--clients", "0").code == 2
