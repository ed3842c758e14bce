"""`gptlab chat`: answers or goes on, commands, what is saved, and errors that leave the conversation as it was."""

from __future__ import annotations

import io
import json
import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from gptlab import compose, train
from gptlab.cli.chat import _plain
from gptlab.runner.load import load
from tests.cli.conftest import Command
from tests.tiny import tiny


@pytest.fixture
def base(corpus_file: Path) -> str:
    found = train(compose(tiny(corpus_file, "study=s", steps=3))).run
    assert found is not None
    return found.identity


@pytest.fixture
def talker(corpus_file: Path) -> str:
    pytest.importorskip("rustbpe", reason="needs rustbpe, of gptlab's extra `bpe`")
    found = train(compose(tiny(corpus_file, "study=t", "data/tokenizer=bpe", "data.tokenizer.vocabulary=270", steps=2))).run
    assert found is not None
    return found.identity


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, gptlab: Command):  # type: ignore[no-untyped-def]
    def run(name: str, *lines: str, options: tuple[str, ...] = ()):  # type: ignore[no-untyped-def]
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return gptlab("chat", name, "--max-tokens", "9", *options)

    return run


def test_a_base_model_goes_on_with_all_that_was_written(base: str, said, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    told = said(base, "the ", "and ", "", f"/save {tmp_path / 'talk.json'}", f"/save {tmp_path / 'talk.txt'}")
    first = load(base).sample("the ", max_tokens=9, seed=0)
    second = load(base).sample(f"the {first}and ", max_tokens=9, seed=1)
    third = load(base).sample(f"the {first}and {second}", max_tokens=9, seed=2)
    assert told.code == 0
    assert told.out.startswith(f"{first}\n{second}\n{third}\n")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert saved["text"] == f"the {first}and {second}{third}" == (tmp_path / "talk.txt").read_text()
    assert saved["settings"]["seed"] == 3


def test_a_reset_forgets_and_settings_change(base: str, said) -> None:  # type: ignore[no-untyped-def]
    told = said(base, "the ", "/reset", "/temperature 0", "/max_tokens 5", "the ")
    assert told.out.splitlines()[-1] == load(base).sample("the ", max_tokens=5, temperature=0)


def test_a_model_with_chat_tokens_is_asked_as_one(talker: str, said, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "talk.json"
    told = said(talker, "/system Be brief.", "the", "and", "/system", f"/save {file}", options=("--temperature", "3"))
    assert told.code == 0
    saved = json.loads(file.read_text())
    roles = [m["role"] for m in saved["messages"]]
    assert roles[0] == "user"
    assert roles in (["user", "assistant"] * 2, ["user", "assistant"])  # an answer that ended at once is none
    assert all(_plain(m["content"]) in told.out for m in saved["messages"] if m["role"] == "assistant")
    refused = said(talker, f"/save {tmp_path / 'nowhere' / 'x.json'}")
    assert "No such file or directory" in refused.out


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/temperature hot", "/temperature 'hot' must be a number"),
        ("/temperature nan", "/temperature nan must be at least 0"),
        ("/top_k 1.5", "/top_k '1.5' must be a whole number"),
        ("/top_p 2", "/top-p 2.0 must be above 0 and at most 1"),
        ("/tempratur 1", "/tempratur is no command (did you mean temperature?)"),
        ("/", "/ is no command"),
        ("/save", "/save takes a file"),
        ("/system x", "a base model knows no messages"),
        ("☃", "☃"),
        ("/help", "/reset"),
        ("/settings", "temperature 0.8"),
    ],
)
def test_what_means_nothing_is_told_and_the_conversation_goes_on(base: str, said, line: str, told: str) -> None:  # type: ignore[no-untyped-def]
    found = said(base, line, "the ")
    assert found.code == 0
    assert told in " ".join(found.out.split())
    assert found.out.endswith(load(base).sample("the ", max_tokens=9, seed=0) + "\n")


@pytest.mark.slow
def test_the_arrow_keys_bring_back_what_was_written(base: str, tmp_path: Path) -> None:
    """On a terminal, with its history."""
    import pty

    pytest.importorskip("readline", reason="needs readline, which this Python lacks")
    mine, theirs = pty.openpty()
    command = [sys.executable, "-m", "gptlab", "chat", base, "--max-tokens", "3"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)

    read = ""

    def until(text: str) -> None:
        nonlocal read
        while text not in read:
            ready, _, _ = select.select([mine], [], [], 60)
            assert ready, read
            read += os.read(mine, 1 << 16).decode(errors="replace")
        read = read.partition(text)[2]

    try:
        until("> ")
        os.write(mine, b"/temperature 0\n")
        until("temperature 0.0")
        until("> ")
        os.write(mine, b"/settings\n")
        until("max_tokens 3")
        until("> ")
        os.write(mine, b"\x1b[A\x1b[A\n")  # twice up
        until("temperature 0.0")
        os.write(mine, b"/quit\n")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(mine)


def test_an_escape_sequence_of_the_model_s_does_not_reach_the_terminal(base: str, said, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("gptlab.data.tokenizer.CharTokenizer.decode", lambda self, ids: "\x1b[31m\x9b2J\a\ta\n" * len(ids))
    told = said(base, "the ", options=("--max-tokens", "1"))
    assert told.out == "\ufffd[31m\ufffd2J\ufffd\ta\n\n"


def test_options_that_mean_nothing_are_refused(base: str, said) -> None:  # type: ignore[no-untyped-def]
    for options, told in (
        (("--temperature", "-1"), "--temperature -1.0 must be at least 0"),
        (("--system", "x"), "a base model knows no messages"),
        (("--device", "tpu"), "--device tpu: this machine has"),
    ):
        found = said(base, options=options)
        assert (found.code, found.out) == (2, "")
        assert told in " ".join(found.err.split())
