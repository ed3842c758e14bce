"""A stream of the hub: limits and growth, an order that does not depend on how much is there, and the process that goes on preparing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptlab import compose, train
from gptlab.config.errors import ConfigError, DataError, GptlabError, IOFailure, Stopped
from gptlab.config.registry import component, register
from gptlab.config.schema import DataConfig
from gptlab.data import background, hub_rows, pipeline, prepared, shard, sources, work
from gptlab.data import hub as hub_module
from gptlab.data.background import Background
from gptlab.data.loader import Loader
from gptlab.data.prepare import prepare
from gptlab.data.prepared import GrowingStream, Prepared, open_prepared, preparer, preparing, read_progress, stripes
from gptlab.data.sources import Packed, Rows, Windows, training_rows
from gptlab.runner import checkpoint
from gptlab.runner.callback import Callback
from gptlab.runner.run import Run
from gptlab.runner.trainer import Trainer
from tests.data.test_pipeline import files_of
from tests.data.test_shard import ids_of
from tests.stand_ins.hub_server import Server, write_repository

NAME = "owner/stream"
DRAW = random.Random(1)
TEXTS: list[str | None] = [" ".join(DRAW.choices(["der", "die", "das", "Haus", "geht", "und"], k=DRAW.randint(1, 40))) for _ in range(400)]
TEXTS[::17] = [None] * len(TEXTS[::17])
UNIT = 400
# What the process in the background is told too: it reads its own constants.
PLUGIN = f"""
from gptlab.data import hub, pipeline
import huggingface_hub.utils._http as http
hub.ASK_WAITS = hub.READ_WAITS = ()
pipeline.UNIT, pipeline.COMMIT_SECONDS = {UNIT}, 0.0
class Time:
    def __getattr__(self, name):
        import time
        return (lambda seconds: None) if name == "sleep" else getattr(time, name)
http.time = Time()
import os, time
if os.environ.get("SLOW_STREAM"):
    plain = hub.texts_of
    hub.texts_of = lambda values: (time.sleep(0.3), plain(values))[1]
"""


@pytest.fixture
def server(hub: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A hub with a data set, read and written in small units, here and in the background."""
    hub.publish(NAME, write_repository(tmp_path / "repository", {"default": {"train": TEXTS}}, row_group=20))
    plugin = tmp_path / f"hurried_{hub.server_port}.py"
    plugin.write_text(PLUGIN)
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "0", "GPTLAB_PLUGINS": str(plugin)}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    for module, constants in (
        (pipeline, {"UNIT": UNIT, "COMMIT_SECONDS": 0.0}),
        (shard, {"SHARD_TOKENS": 1500}),
        (hub_rows, {"BLOCK": 1 << 10, "BATCH": 600}),
        (work, {"POLL_SECONDS": 0.02}),
        (prepared, {"POLL_SECONDS": 0.02}),
        (hub_module, {"ASK_WAITS": (), "READ_WAITS": ()}),
    ):
        for name, constant in constants.items():
            monkeypatch.setattr(module, name, constant)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.syspath_prepend(str(tmp_path))
    return hub


def config(tokens: str = "", *, tokenizer: str = "byte", held_out: str = "1k", **values: Any) -> DataConfig:
    corpus: Any = component("data/corpus", "hub").options
    chosen: Any = component("data/tokenizer", tokenizer).options
    return DataConfig(corpus=corpus(dataset=NAME, tokens=tokens, held_out=held_out), tokenizer=chosen(), **values)


def stripes_of(monkeypatch: pytest.MonkeyPatch, first: int, largest: int) -> None:
    for module in (prepared, sources):
        monkeypatch.setattr(module, "FIRST_STRIPE", first)
        monkeypatch.setattr(module, "LARGEST_STRIPE", largest)


# Limits


def test_exactly_the_tokens_asked_for_are_used_and_more_continue(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = prepare(config("2k"))
    assert len(small.stream("train")) == 2000
    assert small.split_counts("train")["tokens"] >= 2000
    before, first = files_of(small.folder), small.hash
    requests = len(server.requests)
    again = prepare(config("2k"))
    assert len(server.requests) == requests, "what is prepared needs no network"
    assert again.hash == first
    reports: list[Any] = []
    large = prepare(config("5k"), report=reports.append)
    assert large.folder == small.folder
    assert min(p.tokens for p in reports if p.stage == "train") > 2000, "it began anew"
    assert len(large.stream("train")) == 5000
    assert ids_of(large)[:2000] == ids_of(small)
    assert large.hash != first
    assert prepare(config("2k")).hash == first, "the hash depends on the limit, not on how much is there"
    assert large.manifest == small.manifest
    assert ids_of(large, "val") == ids_of(small, "val")
    after = files_of(large.folder)
    assert all(after[name] == content for name, content in before.items() if not name.startswith("train"))
    monkeypatch.setenv("GPTLAB_HOME", str(tmp_path / "direct"))
    direct = prepare(config("5k"))
    assert files_of(direct.folder) == files_of(large.folder)
    record = [read_progress(p.folder)["splits"]["train"] for p in (direct, large)]
    assert record[0] == record[1]
    assert direct.hash == large.hash


def test_all_of_a_stream_is_its_documents_in_order_the_first_held_out(server: Server) -> None:
    made = prepare(config())
    texts = [t for t in TEXTS if t]
    characters = np.cumsum([0, *map(len, texts)])
    held = int((characters[:-1] < 1000).sum())
    border = [256]
    for split, part in (("val", texts[:held]), ("train", texts[held:])):
        expected = [list(t.encode()) for t in part]
        assert ids_of(made, split) == [*expected[0], *(i for t in expected[1:] for i in [*border, *t])]
        assert made.stream(split).document_starts().tolist() == [0, *np.cumsum([len(expected[0]), *(len(t) + 1 for t in expected[1:-1])])]
    assert sum(made.split_counts(s)["skipped"]["null"] for s in ("val", "train")) == TEXTS.count(None)
    assert made.split_counts("train")["ended"]


def test_a_stream_that_ends_before_its_limit_is_all_there_is(server: Server) -> None:
    made, whole = prepare(config("1G")), prepare(config())
    assert ids_of(made) == ids_of(whole)
    assert made.hash != whole.hash


def test_a_broken_connection_changes_no_byte(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare(config("9k"))
    monkeypatch.setenv("GPTLAB_HOME", str(tmp_path / "again"))
    draw, failures = random.Random(0), 0
    for _ in range(100):
        server.faults.unavailable = draw.randint(0, 7)  # the client asks six times
        server.faults.drops = deque(draw.choices([0, 50, 500], k=draw.randint(0, 3)))
        try:
            found = prepare(config("9k"))
            break
        except IOFailure:
            failures += 1
    assert failures
    assert files_of(found.folder) == files_of(whole.folder)


def test_what_was_all_held_out_or_holds_no_text_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"held_out=10,000,000 characters are held out for validation, and stream has only [\d,]+; give a"):
        prepare(config(held_out="10M"))
    server.publish("owner/nothing", write_repository(tmp_path / "r", {"default": {"train": [None, "", " "]}}))
    nothing = config()
    nothing.corpus.dataset = "owner/nothing"  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="nothing was held out"):
        prepare(nothing)


def test_a_validation_set_that_is_trained_on_stays_refused(server: Server, tmp_path: Path) -> None:
    (tmp_path / "leak.txt").write_text("\n".join(t for t in TEXTS[200:240] if t))
    (tmp_path / "fair.txt").write_text("nothing of this stands in the stream, whatever " * 50)
    for _ in range(2):
        with pytest.raises(DataError, match=r"data\.validation\.leak: \d+% of it stands in the training text"):
            prepare(config("30k", validation={"leak": str(tmp_path / "leak.txt")}))
    assert prepare(config("30k", validation={"fair": str(tmp_path / "fair.txt")})).validation_names == ["val", "fair"]


def test_a_tokeniser_of_characters_is_refused_since_later_text_may_hold_others(server: Server) -> None:
    with pytest.raises(ConfigError, match=r"data/tokenizer=char .*data/tokenizer=(byte|bpe)"):
        prepare(config("2k", tokenizer="char"))


# The order of training


class Growth:
    """A stream's folder as it was at each record of its preparation: calling it lets the next come."""

    def __init__(self, folder: Path, records: list[str], at: int) -> None:
        self.folder, self.records, self.at = folder, records, at
        self.show()

    def show(self) -> None:
        (self.folder / prepared.PROGRESS).write_text(self.records[self.at])

    def __call__(self) -> None:
        self.at = min(self.at + 1, len(self.records) - 1)
        self.show()


@pytest.fixture
def grown(server: Server, monkeypatch: pytest.MonkeyPatch) -> tuple[Prepared, list[str]]:
    """A prepared stream, and every record of its training text."""
    records: list[str] = []
    plain = shard.write_json

    def kept(file: Path, content: Any) -> None:
        plain(file, content)
        if file.name == prepared.PROGRESS and content["splits"].get("train", {}).get("tokens"):
            records.append(json.dumps(content))

    monkeypatch.setattr(work, "write_json", kept)
    monkeypatch.setattr(pipeline, "COMMIT_SECONDS", -1.0)
    monkeypatch.setattr(prepared, "POLL_SECONDS", 0.0)
    made = prepare(config())
    assert len(records) > 30
    return made, records


@pytest.mark.parametrize("limit", [None, 20_000])
@pytest.mark.parametrize("kind", [Windows, Packed])
def test_the_order_is_the_same_whether_all_is_there_or_grows_meanwhile(
    grown: tuple[Prepared, list[str]], monkeypatch: pytest.MonkeyPatch, kind: Callable[[Any, int, int], Rows], limit: int | None
) -> None:
    made, records = grown
    context, rows_of_a_batch = 32, 4
    for first, largest in ((300, 300), (500, 4000)):
        stripes_of(monkeypatch, first, largest)

        def source_at(at: int, calls: list[int]) -> Rows:
            growth = Growth(made.folder, records, at)

            def ensure() -> None:
                calls.append(1)
                growth()

            return kind(GrowingStream(made.folder, made.dtype, limit, ensure), context, 7)

        whole = Loader(source_at(len(records) - 1, []), rows_of_a_batch)
        assert whole.source.settled
        expected = [whole.batch(s) for s in range(150)]
        seen = {tuple(row) for b in expected for row in b.inputs.tolist()}
        assert len(seen) > min(500, whole.source.epoch_rows * 0.9)
        for begin in (0, 3, 100):  # from the beginning, and after a resume
            calls: list[int] = []
            loader = Loader(source_at(0, calls), rows_of_a_batch)
            if begin == 0:
                assert len(calls) < len(records) / 2, "it waited for all of the text"
            for step in range(begin, 150):
                assert torch.equal(loader.batch(step).inputs, expected[step].inputs), f"step {step} from {begin}, stripes of {first}"
                assert torch.equal(loader.batch(step).targets, expected[step].targets)


def test_stripes_double_and_do_not_depend_on_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    stripes_of(monkeypatch, 4, 32)
    assert stripes(200) == [0, 4, 8, 16, 32, 64, 96, 128, 160, 192, 200]
    for length in range(1, 200):
        assert stripes(length)[:-1] == stripes(200)[: len(stripes(length)) - 1]
        assert stripes(length)[-1] == length


def test_every_row_of_a_stream_is_visited_once_an_epoch(grown: tuple[Prepared, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    stripes_of(monkeypatch, 300, 2000)
    for kind in (Windows, Packed):
        made: Rows = kind(grown[0].stream("train"), 32, 0)
        count = made.epoch_rows
        epochs = [made.place(np.arange(e * count, (e + 1) * count)).tolist() for e in range(3)]
        assert all(len(set(e)) == count for e in epochs)
        assert len({tuple(e) for e in epochs}) == 3
        if kind is Packed:
            assert all(sorted(e) == list(range(count)) for e in epochs)
        else:
            assert all(np.unique(np.diff(sorted(e))).tolist() == [32] for e in epochs)


def test_text_that_is_there_is_used_before_a_failure_is_told(grown: tuple[Prepared, list[str]]) -> None:
    made, records = grown
    Growth(made.folder, records, 0)

    def failed() -> None:
        Growth(made.folder, records, 20)  # written before it failed
        raise IOFailure("the hub is gone")

    stream = GrowingStream(made.folder, made.dtype, None, failed)
    wanted = json.loads(records[10])["splits"]["train"]["tokens"]
    Growth(made.folder, records, 20)
    assert stream.reach(wanted) >= wanted
    with pytest.raises(IOFailure, match="the hub is gone"):
        stream.reach(json.loads(records[25])["splits"]["train"]["tokens"])


# The process in the background


def begun(made_of: DataConfig) -> tuple[Prepared, Background]:
    found = prepare(made_of, background=True)
    assert isinstance(found.ensure, Background)
    return found, found.ensure


def test_the_background_process_starts_stops_and_is_started_anew(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTLAB_HOME", str(tmp_path / "whole"))
    whole = prepare(config())
    monkeypatch.setenv("GPTLAB_HOME", str(tmp_path / "home"))
    found, ensure = begun(config())
    first = ensure._process
    assert first is not None
    assert "train" in read_progress(found.folder)["splits"]
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    with pytest.raises(GptlabError, match=r"the preparation in the background ended with code -9; see .*prepare\.log"):
        ensure()
    ensure()
    second = ensure._process
    assert second is not None
    assert second.pid != first.pid
    stream = found.stream("train")
    assert isinstance(stream, GrowingStream)
    assert stream.reach(1 << 40) == len(stream) == len(whole.stream("train"))
    assert stream.complete
    found.close()
    assert second.poll() is not None, "it is stopped by close()"
    assert ids_of(open_prepared(found.folder)) == ids_of(whole)
    assert not (found.folder / background.FAILED).exists()


def test_a_process_that_is_stopped_records_what_it_wrote(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOW_STREAM", "1")
    found, ensure = begun(config())
    process = ensure._process
    assert process is not None
    found.close()
    assert not read_progress(found.folder)["splits"]["train"]["ended"], "it was waited for, and not stopped"
    assert process.returncode == 0, "it left by itself, and was not killed"
    assert preparer(found.folder) is None
    record = read_progress(found.folder)["splits"]["train"]
    for entry in record["shards"]:
        assert (found.folder / entry["file"]).stat().st_size >= 2 * entry["tokens"]
    assert ids_of(prepare(config()))[: record["tokens"]] == ids_of(found)[: record["tokens"]]


@pytest.mark.parametrize("kind", [ConfigError, DataError, IOFailure])
def test_an_error_in_the_background_reaches_the_caller_with_its_exit_code(tmp_path: Path, kind: type[GptlabError]) -> None:
    made_of = Background(config(), tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE)
    ended.wait()
    made_of._process = ended
    (tmp_path / background.FAILED).write_text(json.dumps({"code": kind.code, "message": "what was wrong"}))
    with pytest.raises(kind, match="what was wrong") as error:
        made_of()
    assert error.value.code == kind.code


def test_a_second_process_waits_for_the_one_that_writes(server: Server) -> None:
    found, ensure = begun(config("3k"))
    ensure.stop()
    with preparing(found.folder) as mine:
        assert mine
        before = {f.name: f.stat().st_mtime_ns for f in found.folder.iterdir()}
        other = Background(config("8k"), found.folder)
        other()
        assert other._process is None, "another is at it"
        assert preparer(found.folder) == f"process {os.getpid()} on {os.uname().nodename}"
        with preparing(found.folder) as again:
            assert not again
        waiting = []

        class Enough(Exception):
            pass

        def told(progress: Any) -> None:
            waiting.append(progress.waiting)
            if len(waiting) == 3:
                raise Enough

        with pytest.raises(Enough):
            prepare(config("8k"), report=told)
        assert set(waiting) == {f"process {os.getpid()} on {os.uname().nodename}"}
        assert {f.name: f.stat().st_mtime_ns for f in found.folder.iterdir()} == before
    assert len(prepare(config("8k")).stream("train")) == 8000


# Training while it grows


class StopAt(Callback):
    """Stops training after a step, once."""

    fired = False

    def __init__(self, *, step: int = 0) -> None:
        self.step = step

    def on_step(self, trainer: Trainer) -> None:
        if trainer.state.step == self.step and not StopAt.fired:
            StopAt.fired = True
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def stop_at() -> None:
    StopAt.fired = False
    register("callback", "stop_at")(StopAt)


def run_config(*more: str, step: int = 0) -> Any:
    return compose([
        "data=hub", f"data.corpus.dataset={NAME}", "data.corpus.held_out=1k", "data/tokenizer=byte", "data.validation_tokens=200",
        "model.width=16", "model.depth=1", "model.heads=2", "model.context_length=32", "trainer.batch_tokens=256",
        "trainer.budget=80steps", "trainer.log_every=1", "callbacks.samples.tokens=4", "tracker=none",
        "+callback@callbacks.stop=stop_at", f"callbacks.stop.step={step}", *more,
    ])  # fmt: skip


def weights(run: Run) -> dict[str, torch.Tensor]:
    return checkpoint.load_model(checkpoint.require_good(run.checkpoints))


def test_a_run_while_streaming_survives_outage_and_stop_with_the_same_weights(
    server: Server, stop_at: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stripes_of(monkeypatch, 1000, 4000)
    monkeypatch.setenv("GPTLAB_HOME", str(tmp_path / "streaming"))
    prepare(config("5k"))  # what is there when the hub goes away
    server.faults.unavailable = 10**6
    with pytest.raises(IOFailure, match="the same command goes on from there") as error:
        train(run_config(step=70))
    assert error.value.code == 74
    (directory,) = (d for d in (tmp_path / "runs" / "default").iterdir() if d.is_dir())
    failed = json.loads((directory / "failed.json").read_text())
    assert failed["code"] == 74
    reached = sorted(int(d.name.split("-")[-1]) for d in (directory / "checkpoints").iterdir())
    assert reached[-1] >= 6, "what was there was not trained on"
    server.faults.unavailable = 0
    with pytest.raises(Stopped):
        train(run_config(step=70))
    resumed = train(run_config(step=70))
    assert resumed.state == "done"
    assert resumed.run.directory == directory
    broken = weights(resumed.run)

    monkeypatch.setenv("GPTLAB_HOME", str(tmp_path / "beforehand"))
    monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / "runs2"))
    prepare(config())
    straight = train(run_config(step=0))
    assert straight.state == "done"
    expected = weights(straight.run)
    assert all(torch.equal(broken[k], expected[k]) for k in expected)


def test_an_unlimited_stream_has_no_epochs_and_a_limited_one_has(server: Server, stop_at: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stripes_of(monkeypatch, 1000, 4000)
    prepare(config("3k"))
    with pytest.raises(ConfigError, match=r"trainer\.budget=1epochs: this text has no known end; give data\.corpus\.tokens, or a budget"):
        train(run_config("trainer.budget=1epochs"))
    done = train(run_config("trainer.budget=1epochs", "data.corpus.tokens=3k"))
    rows_ = training_rows(prepare(config("3k")), 32, "concatenate", 0).epoch_rows
    assert json.loads((done.run.directory / "done.json").read_text())["summary"]["step"] == pytest.approx(rows_ * 32 / 256, abs=1)


def test_waiting_ends_soon_after_the_text_is_there(grown: tuple[Prepared, list[str]]) -> None:
    made, records = grown
    growth = Growth(made.folder, records, 0)
    stream = GrowingStream(made.folder, made.dtype, None, growth)
    started = time.monotonic()
    assert stream.reach(1 << 50) == json.loads(records[-1])["splits"]["train"]["tokens"]
    assert time.monotonic() - started < 10
