"""The server under load and in trouble: queues, clients that leave, models that fail, who may ask, votes."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptlab.data.tokenizer import ByteTokenizer
from tests.generate.serving import events, httpx, served, serving, until

LONG = {"prompt": "the ", "max_tokens": 4000, "stream": True}


@contextlib.contextmanager
def streaming(address: str, **body: Any) -> Iterator[Any]:
    """A stream whose first piece is here."""
    with httpx.Client(timeout=30) as client, client.stream("POST", f"{address}/v1/completions", json=LONG | body) as response:
        lines = response.iter_lines()
        assert response.status_code == 200, response.read()
        next(lines)
        yield lines


def post(address: str, path: str = "completions", **body: Any) -> Any:
    return httpx.post(
        f"{address}/v1/{path}", json={"prompt": "the ", "max_tokens": 4} | body if path == "completions" else body, timeout=30
    )


def test_a_newcomer_joins_texts_that_are_under_way_and_ends_before_them() -> None:
    model = served(slow=0.002)
    with serving(model) as address, streaming(address) as lines:
        assert post(address, max_tokens=5).json()["usage"]["completion_tokens"] == 5
        assert model.scheduler.running == 1
        assert [next(lines) for _ in range(10)]  # which goes on, too


def test_running_texts_are_not_held_up_by_many_that_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps no more prompts are read than the limit allows, and at least one."""
    from gptlab.generate.server import scheduler

    monkeypatch.setattr(scheduler, "READ_AT_ONCE", 8)
    model = served(slow=0.002)
    joined: list[int] = []
    step = scheduler.Scheduler._step

    def noted(self: Any) -> None:
        joined.append(len(self._engine.rows))
        step(self)

    monkeypatch.setattr(scheduler.Scheduler, "_step", noted)
    with serving(model) as address, streaming(address):
        asked = [threading.Thread(target=post, args=(address,), kwargs={"prompt": "the end", "max_tokens": 50}) for _ in range(10)]
        for one in asked:
            one.start()
        for one in asked:
            one.join()
    assert max(joined) > 5
    assert max(after - before for before, after in itertools.pairwise(joined)) == 1


def test_a_long_prompt_is_read_between_the_steps_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptlab.generate.server import scheduler

    monkeypatch.setattr(scheduler, "READ_AT_ONCE", 4)
    model = served(slow=0.002)
    read: list[int] = []
    step = scheduler.Scheduler._step

    def noted(self: Any) -> None:
        if self._reading is not None:
            read.append(self._reading[1].left)
        step(self)

    monkeypatch.setattr(scheduler.Scheduler, "_step", noted)
    with serving(model) as address, streaming(address):
        assert post(address, prompt="a prompt of 26 characters.").status_code == 200
        assert read == [22, 18, 14, 10, 6, 2]  # a step of the other after each piece
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f"{address}/v1/completions", json=LONG | {"prompt": "x" * 30, "stream": False}, timeout=0.1)
        until(lambda: model.scheduler.running == 1 and model.scheduler._reading is None, 3)


def test_a_client_that_leaves_frees_its_place_whether_it_streams_or_waits() -> None:
    model = served(rows=1, slow=0.002)
    with serving(model) as address:
        with streaming(address):
            until(lambda: model.scheduler.running == 1)
        until(lambda: model.scheduler.running == 0, 2)  # 4,000 tokens take longer
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f"{address}/v1/completions", json=LONG | {"stream": False}, timeout=0.2)
        until(lambda: model.scheduler.running == 0, 2)
        assert post(address).status_code == 200


def test_a_client_that_leaves_the_queue_is_never_served() -> None:
    model = served(rows=1, queue=1, slow=0.002)
    with serving(model) as address, streaming(address):
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f"{address}/v1/completions", json=LONG, timeout=0.2)
        until(lambda: all(job.reply.cancelled for job in model.scheduler._waiting), 2)
        with contextlib.suppress(httpx.TimeoutException):  # its place in the queue is free
            assert httpx.post(f"{address}/v1/completions", json=LONG, timeout=0.2).status_code == 200


def test_a_full_queue_answers_503_and_what_waits_is_served() -> None:
    model = served(rows=1, queue=1, slow=0.001)
    with serving(model) as address:
        found: list[Any] = []
        with streaming(address, max_tokens=400):
            waiting = threading.Thread(target=lambda: found.append(post(address)))
            waiting.start()
            until(lambda: len(model.scheduler._waiting) == 1)
            refused = post(address)
            assert (refused.status_code, refused.json()["error"]["code"], refused.headers["Retry-After"]) == (503, "queue_full", "1")
        waiting.join()
        assert found[0].status_code == 200
        assert post(address, n=2).json()["error"]["message"] == "n: this server makes at most 1 texts at once"


def test_a_model_that_fails_says_so_without_a_trace_and_the_server_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    broken, sound = served("broken"), served("sound")
    with torch.no_grad():
        broken.model.embedding.weight.fill_(float("nan"))
    with serving(broken, sound) as address:
        for _ in range(2):
            failed = post(address, model="broken")
            assert failed.status_code == 500
            assert failed.json()["error"]["message"] == "the model failed to make a text; the server's terminal says why"
        streamed = post(address, model="broken", stream=True).text
        assert '"error":{"message":"the model failed' in streamed
        assert "[DONE]" not in streamed
        assert post(address, model="sound").status_code == 200
        assert broken.scheduler.running == 0
    assert "Traceback" in capsys.readouterr().err


def test_nothing_is_left_of_requests_that_are_done() -> None:
    model = served(rows=4)
    with serving(model) as address, httpx.Client() as client:
        for i in range(60):
            assert (
                client.post(
                    f"{address}/v1/completions", json={"prompt": "a", "max_tokens": 2, "n": 1 + i % 3, "stream": i % 2 == 0}
                ).status_code
                == 200
            )
        until(lambda: not model.scheduler._engine.rows)
        assert not model.scheduler._of
        assert not model.scheduler._waiting
        assert model.scheduler._engine._cache is None


@pytest.fixture(scope="module")
def local() -> Iterator[str]:
    with serving(served()) as address:
        yield address


def test_the_page_has_its_policy_and_every_answer_its_headers(local: str) -> None:
    shown = httpx.get(local)
    policy = shown.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert "unsafe" not in policy
    assert "require-trusted-types-for 'script'" in policy
    assert "frame-ancestors 'none'" in policy
    for answer in (
        shown,
        httpx.get(f"{local}/v1/models"),
        httpx.get(f"{local}/nothing"),
        httpx.get(local, headers={"Host": "evil.example"}),
    ):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert not any(name.startswith("access-control") for name in answer.headers)
    assert "http" not in shown.text.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:1234"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost@evil.example"}, 403),
        ({"Host": "192.168.1.7"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Host": "localhost", "Origin": "http://evil.example"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost:81"}, 403),
        ({"Host": "localhost", "Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}, 200),
    ],
)
def test_other_names_and_other_sites_are_refused(local: str, headers: dict[str, str], status: int) -> None:
    assert httpx.get(f"{local}/v1/models", headers=headers).status_code == status


def test_what_is_not_there_says_so_in_the_same_form(local: str) -> None:
    assert httpx.get(f"{local}/v1/completions").status_code == 405
    assert httpx.options(f"{local}/v1/completions", headers={"Access-Control-Request-Method": "POST"}).status_code == 405
    for path in ("/docs", "/openapi.json", "/../../etc/passwd", "/v1/nothing"):
        found = httpx.get(local + path)
        assert found.status_code == 404
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}


def test_a_server_that_others_reach_wants_its_token_and_knows_its_names() -> None:
    with serving(served(), local=False, token="open-sesame", hosts=["box.lan"]) as address:
        assert httpx.get(address).status_code == 200  # the page holds nothing
        assert httpx.get(f"{address}/v1/models").status_code == 401
        assert httpx.get(f"{address}/v1/models", headers={"Authorization": "Bearer open-sesamf"}).status_code == 401
        assert httpx.post(f"{address}/v1/completions", json={"prompt": "x"}).headers["WWW-Authenticate"] == "Bearer"
        given = {"Authorization": "Bearer open-sesame"}
        assert httpx.get(f"{address}/v1/models", headers=given).status_code == 200
        assert httpx.get(f"{address}/v1/models", headers=given | {"Host": "box.lan:8421"}).status_code == 200
        assert httpx.get(f"{address}/v1/models", headers=given | {"Host": "10.0.0.3:8421"}).status_code == 200
        assert httpx.get(f"{address}/v1/models", headers=given | {"Host": "evil.example"}).status_code == 403


def answered(address: str, pair: str, side: str, **more: Any) -> Any:
    return post(address, model=f"blind-{pair}-{side}", **{"seed": 1} | more)


def test_a_vote_on_a_blind_pair_is_written_with_who_was_who(tmp_path: Path) -> None:
    file = tmp_path / "study" / "votes.jsonl"
    file.parent.mkdir()
    file.write_text('{"vote": "a", "cut o')
    first, second = served("first", run="1a", seed=1), served("second", run="2b", seed=2)
    seen = set()
    with serving(first, second, votes=file) as address:
        for vote in ("a", "b", "tie", "bad") * 3:
            begun = post(address, "blind").json()
            assert set(begun) == {"pair", "chat"}  # and not who is who
            early = post(address, "votes", pair=begun["pair"], vote=vote)
            assert (early.status_code, early.json()["error"]["param"]) == (400, "pair")
            texts = {}
            for side in ("a", "b"):
                told = answered(address, begun["pair"], side, stream=side == "b")
                text = told.json()["choices"][0]["text"] if side == "a" else "".join(c["choices"][0]["text"] for c in events(told))
                assert "first" not in told.text
                assert "second" not in told.text
                texts[side] = text
            done = post(address, "votes", pair=begun["pair"], vote=vote).json()
            line = json.loads(file.read_text().splitlines()[-1])
            assert (line["vote"], line["prompt"]) == (vote, ["the "])
            for side in ("a", "b"):
                assert line[side] == {
                    "run": {"first": "1a", "second": "2b"}[done[side]["model"]],
                    "label": done[side]["label"],
                    "answer": texts[side],
                }
            seen.add(done["a"]["model"])
            assert post(address, "votes", pair=begun["pair"], vote=vote).status_code == 404  # one vote a pair
    assert seen == {"first", "second"}  # in random order (all the same: once in 2,048)
    assert file.read_text().splitlines()[0] == '{"vote": "a", "cut o'
    assert len(file.read_text().splitlines()) == 13


def test_votes_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    with serving(served("first"), served("second", seed=1), votes=tmp_path / "votes.jsonl") as address:
        pair = post(address, "blind").json()["pair"]
        assert answered(address, pair, "a").status_code == 200
        assert answered(address, pair, "b", prompt="another").json()["error"]["message"] == "both models of a blind pair are asked the same"
        assert answered(address, pair, "c").status_code == 404
        assert post(address, "votes", pair=pair, vote="both").status_code == 422
        assert post(address, "votes", pair=["x"], vote="a").status_code == 404
        assert post(address, "blind", models=["first", "first"]).status_code == 400
        assert post(address, "blind", models=["first", "nobody"]).status_code == 404
        assert post(address, "blind", models="first").status_code == 422
    with serving(served()) as address:
        assert post(address, "blind").status_code == 400
    assert not (tmp_path / "votes.jsonl").exists()


def test_a_byte_that_is_no_character_streams_as_such() -> None:
    assert isinstance(served().tokenizer, ByteTokenizer)
    with serving(served()) as address:
        whole = post(address, max_tokens=80, seed=4).json()["choices"][0]["text"]
        streamed = events(post(address, max_tokens=80, seed=4, stream=True, logprobs=0))
        assert "".join(c["choices"][0]["text"] for c in streamed) == whole
