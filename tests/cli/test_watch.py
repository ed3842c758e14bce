"""`gptlab watch STUDY`: the page with what still goes on, for this machine alone."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptlab import compose, train
from gptlab.cli.watch import ADDRESS, Watch
from gptlab.config.compose import settings
from gptlab.runner.run import Run, all_runs
from tests.cli.conftest import Command
from tests.tiny import tiny


@pytest.fixture
def study(corpus_file: Path) -> str:
    """Two arms; the second's only run is not done."""
    for norm in ("layernorm", "rmsnorm"):
        train(compose([*tiny(corpus_file, "study=w", f"model/norm={norm}", steps=4)]), settings=settings([f"model/norm={norm}"]))
    (run_of("rmsnorm").directory / "done.json").unlink()
    return "w"


def run_of(norm: str) -> Run:
    return next(r for r in all_runs() if f"norm={norm}" in r.name)


@pytest.fixture
def server(study: str) -> Iterator[Watch]:
    with Watch(study, 0) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.05,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def get(server: Watch, path: str = "/", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection(ADDRESS, server.port, timeout=20)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read().decode()


def data_of(text: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    read: dict[str, Any] = json.loads(found)
    return read


def test_runs_that_go_on_are_shown_beside_those_that_are_done(server: Watch) -> None:
    status, headers, text = get(server)
    assert status == 200
    assert headers["Refresh"] == "10"
    data = data_of(text)
    assert [row["label"] for row in data["comparison"]["rows"]] == ["layernorm"]
    assert [(arm["label"], [run["state"] for run in arm["runs"]]) for arm in data["arms"]] == [
        ("layernorm", ["done"]),
        ("rmsnorm", ["stopped"]),
    ]
    assert "train/loss" in data["arms"][1]["runs"][0]["curves"]
    assert data["live"]


def test_a_study_without_a_finished_run_has_a_page_too(server: Watch) -> None:
    (run_of("layernorm").directory / "done.json").unlink()
    server._made = 0.0
    data = data_of(get(server)[2])
    assert data["comparison"]["rows"] == []
    assert len(data["arms"]) == 2


def test_no_other_name_and_no_other_path_is_answered(server: Watch) -> None:
    assert get(server, Host=f"evil.example:{server.port}")[0] == 403
    assert get(server, Host=f"localhost:{server.port}")[0] == 200
    assert get(server, "/../../etc/passwd")[0] == 404
    assert server.server_address[0] == "127.0.0.1"


def test_an_unknown_study_and_a_port_that_is_taken_are_told(server: Watch, gptlab: Command) -> None:
    taken = gptlab("watch", "w", "--port", str(server.port))
    assert taken.code == 2
    assert f"--port {server.port} cannot be had" in taken.err
    assert gptlab("watch", "w", "--port", "99999").code == 2
    unknown = gptlab("watch", "v")
    assert unknown.code == 2
    assert "no study is called 'v'" in unknown.err
