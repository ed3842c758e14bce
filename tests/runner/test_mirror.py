"""A run's copy elsewhere is whole or not there, costs the run nothing, and brings the run back."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from fsspec import register_implementation
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from gptlab import compose, train
from gptlab.config.errors import CheckpointError, ConfigError, GptlabError, IOFailure, Stopped
from gptlab.config.registry import register
from gptlab.data.hub import Hub
from gptlab.data.shard import file_hash
from gptlab.runner import checkpoint, mirror
from gptlab.runner.callback import Callback
from gptlab.runner.fetch import fetch
from gptlab.runner.mirror import Mirror, MirrorWarning
from gptlab.runner.place import check_url
from gptlab.runner.run import Run, locked
from gptlab.runner.trainer import Trainer
from tests.tiny import tiny


class Faulty(MemoryFileSystem):
    """A filesystem in memory that notes what is put, and does before it what a test says."""

    protocol = "faulty"
    cachable = False
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    puts: ClassVar[list[str]] = []
    before: ClassVar[Callable[[str, str], None]] = lambda action, path: None

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("faulty://"))

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        Faulty.before("put", rpath)
        super().put_file(lpath, rpath, **kwargs)
        Faulty.puts.append(rpath.removeprefix("/there/study/base-0123456789/"))

    def get_file(self, rpath: str, lpath: Any = None, **kwargs: Any) -> None:
        Faulty.before("get", rpath)
        super().get_file(rpath, lpath, **kwargs)

    def rm_file(self, path: str) -> None:
        Faulty.before("rm", path)
        super().rm_file(path)


register_implementation("faulty", Faulty, clobber=True)
THERE = "faulty://there/study/base-0123456789"


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(mirror, "WAITS", (0.01, 0.01))
    monkeypatch.setattr(Faulty, "before", lambda action, path: None)
    yield
    for files in (Faulty, MemoryFileSystem):
        files.store.clear()
        files.pseudo_dirs[:] = [""]
    Faulty.puts.clear()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that never was trained: what a mirror sees of one."""
    made = Run(tmp_path / "runs" / "study" / "base-0123456789")
    made.directory.mkdir(parents=True)
    for name in ("config.json", "data.json", "environment.json", "tokenizer.json"):
        made.write(name, {"config": {"data": {"corpus": {"name": "text"}}}, "manifest": {}})
    made.metrics_file.write_text('{"step": 1}\n')
    return made


def save(run: Run, step: int, content: str = "weights") -> Path:
    """A checkpoint with two files of data."""
    folder = run.checkpoints / checkpoint.checkpoint_name(step)
    aside = folder.with_name(f".{folder.name}.part")
    aside.mkdir(parents=True)
    for name in ("model.safetensors", "state.json"):
        (aside / name).write_text(f"{content} of {name} at step {step}")
    files = {f.name: {"sha256": file_hash(f), "bytes": f.stat().st_size} for f in aside.iterdir()}
    (aside / "manifest.json").write_text(json.dumps({"format": checkpoint.FORMAT, "step": step, "files": files}))
    shutil.rmtree(folder, ignore_errors=True)
    return aside.rename(folder)


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything below a folder but locks."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}


def there(url: str = THERE) -> dict[str, bytes]:
    """Everything that lies at an address in memory."""
    fs = Faulty() if url.startswith("faulty") else MemoryFileSystem()
    path = fs._strip_protocol(url)
    return {str(name)[len(path) + 1 :]: file.getvalue() for name, file in fs.store.items() if str(name).startswith(path + "/")}


def mirrored(run: Run, url: str = "faulty://there", **options: Any) -> str | None:
    """Copy a run as it is."""
    return Mirror(url, run, **options).close(20)


def wait_for(condition: Callable[[], object]) -> None:
    ends = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)


# Addresses.


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("s4://bucket/runs", "no such protocol as s4"),
        ("s3::memory://bucket", "cannot be written to"),
        ("https://host/folder", "cannot be written to"),
        ("sftp://me:hunter2@host/folder", "SSH key"),
        ("s3://AKIA:hunter2/+x@bucket/runs", "AWS_SECRET_ACCESS_KEY"),
        ("ftp://me:hunter2@host/folder", "FSSPEC_FTP_PASSWORD"),
        ("abfs://box/runs?sig=hunter2", "environment"),
    ],
)
def test_an_address_that_cannot_be_is_refused_in_a_sentence_without_its_secrets(url: str, told: str, run: Run) -> None:
    for call in (lambda: check_url(url), lambda: Mirror(url, run), lambda: fetch(url, run.directory.parents[1])):
        with pytest.raises(ConfigError) as error:
            call()
        assert told in str(error.value)
        assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(("url", "package"), [("s3://b/x", "s3fs"), ("gs://b/x", "gcsfs"), ("hf://datasets/me/x", "huggingface_hub")])
def test_a_missing_package_is_named(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url.split(":")[0], raising=False)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        check_url(url)


def test_addresses_that_can_be_are_accepted_without_a_network() -> None:
    for url in ("/mnt/backup", "backup", "~/x", "file:///mnt/b", "memory://x", "hf://datasets/me/runs@main", "ftp://host:21/a@b"):
        check_url(url)


def test_a_folder_is_made_absolute_at_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with closing(Mirror("backup", run)) as copy:
        assert copy.address == str(tmp_path / "backup" / "study" / run.directory.name)
        monkeypatch.chdir("/")
    assert (tmp_path / "backup" / "study" / run.directory.name / "config.json").is_file()


def test_a_mirror_onto_the_run_itself_is_refused(run: Run) -> None:
    for url in (str(run.directory.parents[1]), f"file://{run.directory}", str(run.directory / "backup")):
        with pytest.raises(ConfigError, match="where the run itself lies"):
            Mirror(url, run)


# Copying.


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_a_mirror_is_equal_to_the_run(run: Run, tmp_path: Path, where: str) -> None:
    for step in (3, 7):
        save(run, step)
    for name in ("log.txt", "log.1.txt", "passed.jsonl", "done.json", "samples/step-7.txt", "batches/batch-3.safetensors"):
        (run.directory / name).parent.mkdir(exist_ok=True)
        (run.directory / name).write_text(name)
    expected = files_of(run.directory)
    for name in (
        "wandb/run.wandb",
        ".secret.json",
        "samples/.x.part",
        "metrics.part",
        "checkpoints/.step-000000009.part/model.safetensors",
    ):
        (run.directory / name).parent.mkdir(exist_ok=True)
        (run.directory / name).write_text(name)
    url = str(tmp_path / "backup") if where == "folder" else "memory://backup"
    assert mirrored(run, url) is None
    below = f"study/{run.directory.name}"
    assert (files_of(tmp_path / "backup" / below) if where == "folder" else there(f"{url}/{below}")) == expected
    assert not (run.directory / ".mirror").exists()


def test_only_what_has_changed_is_copied_again(run: Run) -> None:
    save(run, 3)
    with closing(Mirror("faulty://there", run)) as copy:
        copy.push()
        wait_for(lambda: "checkpoints/step-000000003/manifest.json" in Faulty.puts)
        Faulty.puts.clear()
        with run.metrics_file.open("a") as metrics:
            metrics.write('{"step": 2}\n')
    assert Faulty.puts == ["metrics.jsonl"]
    Faulty.puts.clear()
    assert mirrored(run) is None, "by another process"
    assert not [p for p in Faulty.puts if p.startswith("checkpoints")]


def test_metrics_are_copied_by_the_clock_where_nobody_pushes(run: Run) -> None:
    with closing(Mirror("faulty://there", run, minutes=0.02 / 60)):
        wait_for(lambda: b'"step": 1' in there().get("metrics.jsonl", b""))
        with run.metrics_file.open("a") as metrics:
            metrics.write('{"step": 2}\n')
        wait_for(lambda: b'"step": 2' in there()["metrics.jsonl"])


def test_a_manifest_comes_after_its_data_and_metrics_and_done_json_last(run: Run) -> None:
    save(run, 3)
    save(run, 7)
    run.write("done.json", {"summary": {}})
    assert mirrored(run) is None
    order = {name: at for at, name in enumerate(Faulty.puts)}
    for step in (3, 7):
        folder = f"checkpoints/step-{step:09d}/"
        manifest = order[folder + "manifest.json"]
        assert manifest > max(
            order[folder + "model.safetensors"], order[folder + "state.json"], order["metrics.jsonl"], order["config.json"]
        )
        assert order["done.json"] > manifest
    assert order["checkpoints/step-000000007/manifest.json"] < order["checkpoints/step-000000003/model.safetensors"], "the newest first"


def test_what_the_run_takes_back_is_taken_back_there(run: Run) -> None:
    run.write("failed.json", {"code": 4})
    assert mirrored(run) is None
    assert "failed.json" in there()
    (run.directory / "failed.json").unlink()
    assert mirrored(run) is None
    assert "failed.json" not in there()


def test_an_old_checkpoint_goes_there_only_when_the_new_one_is_whole(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    old = save(run, 3)
    assert mirrored(run) is None
    save(run, 7)
    shutil.rmtree(old)

    def look(action: str, path: str) -> None:
        if action == "put" and "step-000000007" in path:
            assert "checkpoints/step-000000003/manifest.json" in there()
        if action == "rm":
            assert "checkpoints/step-000000007/manifest.json" in there()

    monkeypatch.setattr(Faulty, "before", look)
    assert mirrored(run) is None
    assert not [name for name in there() if "step-000000003" in name]


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_deleted_while_it_is_copied_leaves_no_half_of_it(run: Run, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """With second names for its files it is copied all the same: else none would ever be, where copying takes longer than it is kept."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(PermissionError("no hard links here")))
    save(run, 3)

    def delete(action: str, path: str) -> None:
        if action == "put" and "step-000000003" in path:
            shutil.rmtree(run.checkpoints / "step-000000003", ignore_errors=True)
            if not (run.checkpoints / "step-000000007").exists():
                save(run, 7)

    monkeypatch.setattr(Faulty, "before", delete)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert mirrored(run) is None
    assert not caught
    assert ("checkpoints/step-000000003/manifest.json" in Faulty.puts) == links
    found = {name.split("/")[1] for name in there() if name.startswith("checkpoints/")}
    assert found == {"step-000000007"}


@pytest.mark.parametrize("links", [True, False])
def test_a_step_saved_anew_while_it_is_copied_is_never_a_mixture(run: Run, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(PermissionError("no hard links here")))
    save(run, 3)
    again = threading.Event()
    sealed: list[set[bytes]] = []

    def replace(action: str, path: str) -> None:
        if action == "put" and path.endswith("step-000000003/state.json") and not again.is_set():
            again.set()
            save(run, 3, "changes")  # as long as before
        if action == "put" and path.endswith("step-000000003/manifest.json"):
            sealed.append({content.split()[0] for name, content in there().items() if name.endswith(("model.safetensors", "state.json"))})

    monkeypatch.setattr(Faulty, "before", replace)
    with closing(Mirror("faulty://there", run)) as copy:
        copy.push()
        wait_for(again.is_set)
        wait_for(lambda: not copy._wake.is_set())
    fetched = fetch(THERE, run.directory.parents[2] / "elsewhere", report=lambda line: None)
    assert files_of(fetched.checkpoints) == files_of(run.checkpoints)
    assert sealed == ([{b"weights"}, {b"changes"}] if links else [{b"changes"}])


def test_a_step_saved_anew_replaces_the_one_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sealed: list[bool] = []

    def look(action: str, path: str) -> None:
        if action == "put" and path.endswith(("model.safetensors", "state.json")):
            sealed.append("checkpoints/step-000000003/manifest.json" in there())

    monkeypatch.setattr(Faulty, "before", look)
    save(run, 3, "first")
    with closing(Mirror("faulty://there", run)) as copy:
        copy.push()
        wait_for(lambda: "checkpoints/step-000000003/manifest.json" in there())
        save(run, 3, "second")
    assert {n: c for n, c in there().items() if n.startswith("checkpoints/")} == {
        f"checkpoints/{n}": c for n, c in files_of(run.checkpoints).items()
    }
    assert sealed == [False] * 4


def test_a_step_that_was_removed_there_is_copied_whole_when_it_is_saved_again(run: Run) -> None:
    with closing(Mirror("faulty://there", run)) as copy:
        for step in (3, 7, 3):
            shutil.rmtree(run.checkpoints, ignore_errors=True)
            save(run, step)
            copy.push()
            name = f"checkpoints/step-{step:09d}/"
            wait_for(lambda: {n.split("/")[1] for n in there() if n.startswith("checkpoints/")} == {name.split("/")[1]})  # noqa: B023
            wait_for(lambda: name + "manifest.json" in there())  # noqa: B023
            assert {name + n for n in ("model.safetensors", "state.json")} <= set(there())


def test_a_checkpoint_damaged_here_does_not_replace_the_good_one_there(run: Run) -> None:
    folder = save(run, 3)
    assert mirrored(run) is None
    before = there()
    for name in ("manifest.json", "model.safetensors"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-5])
    mirrored(run)
    assert {n: c for n, c in there().items() if "step" in n} == {n: c for n, c in before.items() if "step" in n}


def test_the_good_ones_there_stay_while_the_newest_here_is_damaged(run: Run) -> None:
    old = save(run, 3)
    assert mirrored(run) is None
    new = save(run, 7)
    shutil.rmtree(old)
    (new / "model.safetensors").write_text("cut")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "or is damaged here; it lacks step-000000007" in (mirrored(run) or "")
    manifests = [n for n in there() if n.endswith("manifest.json")]
    assert manifests == ["checkpoints/step-000000003/manifest.json"]


def test_a_folder_never_holds_half_a_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mirrored(run, str(tmp_path / "backup")) is None
    before = files_of(tmp_path / "backup")
    run.metrics_file.write_text('{"step": 1}\n{"step": 2}\n')

    def full(self: LocalFileSystem, source: str, target: str, **more: Any) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LocalFileSystem, "put_file", full)
    assert "No space left on device" in (mirrored(run, str(tmp_path / "backup")) or "")
    assert files_of(tmp_path / "backup") == before


def test_a_mirror_that_is_further_along_is_left_alone_until_it_is_passed(run: Run) -> None:
    save(run, 9)
    run.metrics_file.write_text('{"step": 9}\n')
    assert mirrored(run) is None
    before = there()
    shutil.rmtree(run.checkpoints)  # the same command on another machine, without a fetch
    run.metrics_file.write_text("")
    copy = Mirror("faulty://there", run)
    copy.push()
    with pytest.warns(MirrorWarning, match=r"is at step 9 already and the run here has no checkpoint yet.*gptlab runs fetch"):
        wait_for(lambda: copy.complaint)
    save(run, 4)
    copy.push()
    time.sleep(0.05)
    assert there() == before
    save(run, 10)
    shutil.rmtree(run.checkpoints / "step-000000004")
    assert copy.close(20) is None
    assert {n.split("/")[1] for n in there() if n.startswith("checkpoints/")} == {"step-000000010"}


@pytest.mark.parametrize("how", ["start over", "go back"])
def test_a_run_that_starts_over_or_goes_back_on_purpose_takes_its_mirror_along(run: Run, how: str) -> None:
    save(run, 9)
    assert mirrored(run) is None
    if how == "start over":
        shutil.rmtree(run.checkpoints)
    copy = Mirror("faulty://there", run, start_over=how == "start over")
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    save(run, 4)
    assert copy.close(20) is None
    assert {n.split("/")[1] for n in there() if n.startswith("checkpoints/")} == {"step-000000004"}


# Failures.


def test_an_outage_costs_one_warning_and_what_was_missed_is_copied_after_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = threading.Event()
    attempts = []

    def fail(action: str, path: str) -> None:
        if action == "put" and broken.is_set():
            attempts.append(path)
            raise RuntimeError("503, come back later")  # no OSError: a client's own kind

    monkeypatch.setattr(Faulty, "before", fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        copy = Mirror("faulty://there", run)
        for outage in (1, 2):
            broken.set()
            for step in range(3):
                save(run, 10 * outage + step)
                count = len(attempts)
                copy.push()
                wait_for(lambda: len(attempts) >= count + 3)  # noqa: B023, it is called at once
            wait_for(lambda: copy.complaint)
            assert [w.category for w in caught] == [MirrorWarning] * outage
            broken.clear()
            copy.push()
            wait_for(lambda: copy.complaint is None)
        assert copy.close(20) is None
    assert len(caught) == 2
    assert "503, come back later" in str(caught[0].message)
    assert sum(n.endswith("manifest.json") for n in there()) == 6


def test_a_short_failure_is_tried_again_without_a_warning(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 3)
    left = [2]

    def fail(action: str, path: str) -> None:
        if action == "put" and "state.json" in path and left[0]:
            left[0] -= 1
            raise OSError("reset by peer")

    monkeypatch.setattr(Faulty, "before", fail)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mirrored(run) is None
    assert Faulty.puts.count("checkpoints/step-000000003/model.safetensors") == 1, "what was copied is not copied again"


def test_closing_tells_what_is_missing_and_why(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(action: str, path: str) -> None:
        if "step-000000003" in path:
            raise PermissionError("no right to write")

    monkeypatch.setattr(Faulty, "before", fail)
    save(run, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is told once
        said = mirrored(run)
    assert said is not None
    assert "step-000000003" in said
    assert "no right to write" in said
    assert "metrics.jsonl" not in said
    assert str(run.directory) in said


def test_an_address_that_hangs_holds_neither_a_push_nor_the_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 3)
    reached, released = threading.Event(), threading.Event()

    def hang(action: str, path: str) -> None:
        if "step-000000003" in path:
            reached.set()
            released.wait(20)

    monkeypatch.setattr(Faulty, "before", hang)
    copy = Mirror("faulty://there", run)
    started = time.perf_counter()
    for _ in range(1000):
        copy.push()
    assert time.perf_counter() - started < 0.5
    reached.wait(20)
    said = copy.close(0.05)
    assert said is not None
    assert "was not brought up to date within 0.05 s" in said
    released.set()
    copy._thread.join(20)
    assert "checkpoints/step-000000003/manifest.json" not in there(), "nothing is copied once the run has left"


def test_a_machine_that_dies_in_the_middle_of_a_copy_leaves_the_checkpoint_before(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 3)
    assert mirrored(run) is None
    save(run, 7)

    def die(action: str, path: str) -> None:
        if path.endswith("step-000000007/state.json"):
            Faulty().pipe_file(path, b"weig")
            dead.set()
            ended.wait(20)

    dead, ended = threading.Event(), threading.Event()
    monkeypatch.setattr(Faulty, "before", die)
    copy = Mirror("faulty://there", run)
    copy.push()
    assert dead.wait(20)
    assert there()["checkpoints/step-000000007/state.json"] == b"weig"
    lines: list[str] = []
    fetched = fetch(THERE, run.directory.parents[2] / "elsewhere", report=lines.append)
    assert [c.name for c in checkpoint.checkpoints(fetched.checkpoints)] == ["step-000000003"]
    assert "step-000000007: it was not copied whole" in lines[0]
    copy._closing = True
    copy._left.set()
    ended.set()


# Bringing a run back.


@register("callback", "mirror_signal_at")
class SignalAt(Callback):
    """Sends this process a signal after a step."""

    def __init__(self, *, step: int = 5) -> None:
        self.step = step

    def on_step(self, trainer: Trainer) -> None:
        if trainer.state.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_a_fetched_run_ends_with_the_weights_of_one_that_was_never_interrupted(
    corpus_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    overrides = tiny(corpus_file, "model.dropout=0.2")
    whole = train(compose(overrides)).run
    monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / "first"))
    with pytest.raises(Stopped):
        train(compose([*overrides, "+callback@callbacks.stop=mirror_signal_at"]))
    stopped = Run(next((tmp_path / "first").glob("*/*/config.json")).parent)
    url = str(tmp_path / "backup") if where == "folder" else "memory://backup"
    assert mirrored(stopped, url) is None
    shutil.rmtree(tmp_path / "first")  # the rented machine is gone
    monkeypatch.setenv("GPTLAB_RUNS", str(tmp_path / "second"))
    fetched = fetch(url, tmp_path / "second", report=lambda line: None)
    assert fetched.state == "stopped"
    again = train(compose(overrides))
    assert (again.state, again.run) == ("done", fetched)
    a, b = (checkpoint.load_model(checkpoint.require_good(r.checkpoints)) for r in (whole, again.run))
    assert all(torch.equal(a[name], b[name]) for name in a)
    one, two = ([(m["step"], m.get("train/loss"), m.get("val/loss")) for m in r.metrics()] for r in (whole, again.run))
    assert one == two


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    return tmp_path / "elsewhere"


@pytest.mark.parametrize("url", [THERE, THERE + "/", "faulty://there/study", "faulty://there"])
def test_a_run_is_fetched_by_its_address_or_one_above_it(run: Run, elsewhere: Path, url: str) -> None:
    save(run, 3)
    save(run, 7)
    run.write("done.json", {"summary": {}})
    mirrored(run)
    lines: list[str] = []
    fetched = fetch(url, elsewhere, report=lines.append)
    assert fetched.directory == elsewhere / "study" / run.directory.name
    expected = {n: c for n, c in files_of(run.directory).items() if "step-000000003" not in n}
    assert files_of(fetched.directory) == expected, "the newest checkpoint alone"
    assert "brought to step 7" in lines[-1]
    fetch(url, elsewhere, report=lines.append, all_checkpoints=True)
    assert files_of(fetched.directory) == files_of(run.directory)
    assert [f.name for f in elsewhere.iterdir()] == ["study"]


def test_an_address_above_several_runs_lists_them_and_one_above_none_says_so(run: Run, elsewhere: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        fetch("faulty://there", elsewhere)
    mirrored(run)
    other = Run(run.directory.with_name("other-9876543210"))
    shutil.copytree(run.directory, other.directory)
    mirrored(other)
    with pytest.raises(ConfigError, match="holds 2 runs") as error:
        fetch("faulty://there", elsewhere)
    assert THERE in str(error.value)
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        fetch(THERE, elsewhere)
    assert not list(elsewhere.glob("*"))


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "manifest", "other step"])
def test_a_damaged_checkpoint_is_passed_over_and_told(run: Run, elsewhere: Path, tmp_path: Path, damage: str) -> None:
    save(run, 3)
    save(run, 7)
    mirrored(run, str(tmp_path / "backup"))
    folder = tmp_path / "backup" / "study" / run.directory.name / "checkpoints" / "step-000000007"
    file = folder / "model.safetensors"
    content = file.read_bytes()
    if damage == "flip":
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "delete":
        file.unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text('{"format": 1, "files": [')
    else:
        shutil.copytree(folder.with_name("step-000000003"), folder, dirs_exist_ok=True)
    lines: list[str] = []
    fetched = fetch(str(tmp_path / "backup"), elsewhere, report=lines.append, all_checkpoints=True)
    assert [c.name for c in checkpoint.checkpoints(fetched.checkpoints)] == ["step-000000003"]
    assert lines[0].startswith("passed over step-000000007: ")
    shutil.rmtree(folder.with_name("step-000000003"))
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        fetch(str(tmp_path / "backup"), elsewhere / "anew", report=lines.append)


@pytest.mark.parametrize("name", ["../evil", "/evil", ".evil", "a/b", "..", "a\\b", "", "manifest.json"])
def test_a_manifest_whose_names_lead_elsewhere_is_refused(run: Run, elsewhere: Path, name: str) -> None:
    folder = save(run, 3)
    mirrored(run)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["state.json"]
    Faulty().pipe_file(f"{THERE}/checkpoints/step-000000003/manifest.json", json.dumps(manifest).encode())
    for hostile in ("../evil", "/evil", "evil"):
        Faulty().pipe_file(f"{THERE}/checkpoints/step-000000003/{hostile}", b"evil")
    with pytest.raises(CheckpointError, match="step-000000003"):
        fetch(THERE, elsewhere, report=lambda line: None)
    assert not list(elsewhere.rglob("*"))


@pytest.mark.parametrize("path", ["there/../base-0123456789", "there/study/..", "there/.study/base-0123456789", "there/study/.base-01"])
def test_a_study_or_run_whose_name_leads_elsewhere_is_refused(elsewhere: Path, path: str) -> None:
    Faulty().pipe_file(f"/{path}/config.json", b'{"config": {}}')
    with pytest.raises(CheckpointError, match="no plain name"):
        fetch(f"faulty://{path}", elsewhere)
    assert not elsewhere.exists()


def test_nothing_but_what_the_manifest_lists_is_brought(run: Run, elsewhere: Path) -> None:
    save(run, 3)
    mirrored(run)
    for name in ("checkpoints/step-000000003/optimizer.pkl", "checkpoints/evil/x.pt", "evil.py", "wandb/settings", "samples/.hidden"):
        Faulty().pipe_file(f"{THERE}/{name}", b"evil")
    fetched = fetch(THERE, elsewhere, report=lambda line: None)
    assert files_of(fetched.directory) == files_of(run.directory)


@pytest.mark.parametrize("failing", ["model.safetensors", "metrics.jsonl"])
def test_a_fetch_that_breaks_off_leaves_nothing_and_the_next_one_works(
    run: Run, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    save(run, 3)
    mirrored(run)

    def fail(action: str, path: str) -> None:
        if action == "get" and path.endswith(failing):
            raise RuntimeError("the line is dead")

    with monkeypatch.context() as broken:
        broken.setattr(Faulty, "before", fail)
        with pytest.raises(IOFailure, match="the line is dead"):
            fetch(THERE, elsewhere)
    assert not list(elsewhere.iterdir())
    left = elsewhere / ".study-base-0123456789.fetch" / "checkpoints" / "step-000000009"  # and by one that was killed
    left.mkdir(parents=True)
    (left / "model.safetensors").write_text("half")
    fetched = fetch(THERE, elsewhere, report=lambda line: None)
    assert files_of(fetched.directory) == files_of(run.directory)
    assert [f.name for f in elsewhere.iterdir()] == ["study"]


def test_a_disk_that_is_too_small_is_told_before_the_download(run: Run, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 3)
    mirrored(run)
    monkeypatch.setattr(mirror.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(IOFailure, match=r"needs \d+ bytes and .* has 10 free"):
        fetch(THERE, elsewhere)


def test_a_run_that_is_here_gets_what_is_newer_and_no_step_back(run: Run, elsewhere: Path) -> None:
    save(run, 3)
    mirrored(run)
    here = fetch(THERE, elsewhere, report=lambda line: None)
    lines: list[str] = []
    fetch(THERE, elsewhere, report=lines.append)
    assert "nothing newer than step 3" in lines[-1]
    (here.directory / "wandb").mkdir()
    here.write("failed.json", {"code": 1})
    save(run, 7)
    run.metrics_file.write_text('{"step": 7}\n')
    mirrored(run)
    fetch(THERE, elsewhere, report=lambda line: None)
    assert [c.name for c in checkpoint.checkpoints(here.checkpoints)] == ["step-000000007", "step-000000003"]
    assert here.metrics() == [{"step": 7}]
    assert here.state == "stopped"
    assert (here.directory / "wandb").is_dir()
    save(here, 9)
    before = files_of(here.directory)
    with pytest.raises(ConfigError, match=r"at step 9, further than .* at step 7; --force"):
        fetch(THERE, elsewhere)
    assert files_of(here.directory) == before
    fetch(THERE, elsewhere, force=True, report=lambda line: None)
    assert [c.name for c in checkpoint.checkpoints(here.checkpoints)] == ["step-000000007"]


def test_a_damaged_checkpoint_here_is_replaced(run: Run, elsewhere: Path) -> None:
    save(run, 3)
    mirrored(run)
    here = fetch(THERE, elsewhere, report=lambda line: None)
    (here.checkpoints / "step-000000003" / "state.json").write_text("")
    fetch(THERE, elsewhere, report=lambda line: None)
    assert files_of(here.directory) == files_of(run.directory)


def test_a_run_that_is_being_trained_or_fetched_is_left_alone(run: Run, elsewhere: Path) -> None:
    save(run, 3)
    mirrored(run)
    here = fetch(THERE, elsewhere, report=lambda line: None)
    with locked(here), pytest.raises(GptlabError, match=rf"is being trained by process {os.getpid()}"):
        fetch(THERE, elsewhere, force=True)
    staging = elsewhere / ".study-base-0123456789.fetch"
    staging.mkdir()
    with locked(Run(staging)), pytest.raises(GptlabError, match="is being fetched by another process"):
        fetch(THERE, elsewhere)
    with suppress(FileNotFoundError):
        fetch(THERE, elsewhere, report=lambda line: None)


@pytest.mark.parametrize("kind", ["stream", "mix"])
def test_the_commit_that_a_run_was_trained_on_is_pinned_again(run: Run, elsewhere: Path, empty_home: Path, kind: str) -> None:
    commit = "c" * 40
    options = {"name": "hub", "dataset": "owner/texts", "config": "", "revision": ""}
    manifest = {"key": {"fingerprint": {"dataset": "owner/texts", "revision": commit}}}
    if kind == "stream":
        corpus, data = options, {"manifest": manifest}
    else:
        corpus = {"name": "mix", "sources": {"a": options, "b": {"name": "text"}}}
        data = {"manifest": {}, "parts": {"a": manifest, "b": {"splits": {}}}}
    run.write("config.json", {"config": {"data": {"corpus": corpus}}})
    run.write("data.json", data)
    save(run, 3)
    mirrored(run)
    lines: list[str] = []
    fetch(THERE, elsewhere, report=lines.append)
    assert Hub(dataset="owner/texts").commit() == commit, "without asking the hub"
    assert any("owner/texts is pinned to commit cccccccccccc" in line for line in lines)
    other = json.loads((empty_home / "hub" / "owner--texts.json").read_text()) | {"commit": "d" * 40}
    (empty_home / "hub" / "owner--texts.json").write_text(json.dumps(other))
    fetch(THERE, elsewhere, report=lines.append)
    assert Hub(dataset="owner/texts").commit() == "d" * 40, "a pin that is there stays"
    assert "was trained on cccccccccccc: delete" in lines[-1]
