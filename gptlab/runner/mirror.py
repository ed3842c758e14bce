"""A run's copy elsewhere, kept up in the background while it trains: a rented machine may vanish."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import threading
import warnings
from pathlib import Path

from fsspec.core import split_protocol  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from gptlab.config.errors import CheckpointError, ConfigError, GptlabError, IOFailure
from gptlab.runner import checkpoint
from gptlab.runner.checkpoint import MANIFEST
from gptlab.runner.place import ENDS, FOLDERS, Place, absolute, check_url, contents, is_small, reason, step_in
from gptlab.runner.run import Run

WAITS = (1.0, 5.0)  # seconds before an address that failed is tried again, within one push


class MirrorWarning(UserWarning):
    """A mirror that does not keep up: told once, until it works again."""


class Mirror:
    """Keeps a copy of a run at URL/STUDY/RUN/, from a thread of its own, which can fail and cannot hurt the run.

    Files are copied when they have changed, metrics every `minutes` at least. A checkpoint's manifest comes last, and one that was
    deleted here goes there when the newest is whole. Where the copy is further along than the run, nothing is touched until the run
    has passed it, unless the run was told to `start_over`. Raises ConfigError for an address that cannot be.
    """

    def __init__(self, url: str, run: Run, *, minutes: float = 3.0, start_over: bool = False) -> None:
        check_url(url)
        base = absolute(url)
        self.run, self.minutes = Run(Path(os.path.abspath(run.directory))), minutes
        self.address = f"{base}{'' if base.endswith('/') else '/'}{self.run.study}/{self.run.directory.name}"
        if split_protocol(base)[0] in (None, "file", "local"):
            lies = Path(LocalFileSystem._strip_protocol(self.address)).resolve()
            if lies.is_relative_to(self.run.directory.resolve()):
                raise ConfigError(f"the mirror's address {url} is where the run itself lies; give another folder")
        self.complaint: str | None = None  # what is wrong now
        self._began = math.inf if start_over else self._step_here()  # a run may go back on purpose, from where it has been
        self._ahead = -1.0  # the step of the copy that the run has to pass first
        self._place: Place | None = None
        self._known = False  # whether the next two are what lies there
        self._whole: dict[str, bytes] = {}  # checkpoints there, and their manifests; empty for one that has none
        self._files: set[str] = set()
        self._sent: dict[str, object] = {}  # what was copied, and what it looked like here
        self._aside = self.run.directory / ".mirror"
        shutil.rmtree(self._aside, ignore_errors=True)  # of a process that was killed
        self._wake, self._closing, self._left = threading.Event(), False, threading.Event()
        self._thread = threading.Thread(target=self._work, name="gptlab-mirror", daemon=True)
        self._thread.start()

    def push(self) -> None:
        """Ask for the present state to be copied; returns at once."""
        self._wake.set()

    def close(self, timeout: float | None = None) -> str | None:
        """Wait until the present state is copied, at most `timeout` seconds, and end; a sentence about what is missing there, or None."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout)
        self._left.set()  # what still hangs copies nothing more
        late = self._thread.is_alive()
        if not late:
            shutil.rmtree(self._aside, ignore_errors=True)
        lacking = self._lacking()
        if not lacking:
            return None if late else self.complaint
        some = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        if late:
            why = f"{self.address} was not brought up to date within {timeout or 0:g} s"
        else:
            why = self.complaint or f"{self.address} was left while something changed, or is damaged here"
        return f"{why}; it lacks {some}; what there is lies in {self.run.directory}"

    def _work(self) -> None:
        last = False
        while not last and not self._left.is_set():
            self._wake.wait(60 * self.minutes)
            self._wake.clear()
            last = self._closing  # read after the clearing: a close in between is seen
            self._try()

    def _try(self) -> None:
        for wait in (*WAITS, None):
            try:
                self._copy()
            except Exception as error:  # whatever it is, it may not cost the run
                self._known = False
                if wait is None or isinstance(error, GptlabError) or self._left.is_set():
                    self._complain(error)
                    return
                self._left.wait(wait)
            else:
                self.complaint = None
                return

    def _complain(self, error: Exception) -> None:
        first = self.complaint is None
        told = str(error) if isinstance(error, GptlabError) else f"{self.address} could not be brought up to date ({reason(error)})"
        self.complaint = told
        if first and not self._closing:  # at the end it is `close` that tells
            message = MirrorWarning(f"{self.complaint}; the run goes on, and the next push tries again")
            with contextlib.suppress(MirrorWarning):  # where warnings are errors
                # a registry of its own, since Python shows the same text from the same line only once
                warnings.warn_explicit(message, MirrorWarning, __file__, 1, registry={})

    def _copy(self) -> None:
        """Make the copy equal to the run."""
        directory = self.run.directory
        if not (directory / "config.json").is_file():  # not begun, or deleted: nothing there is worth less than before
            return
        ends = [name for name in ENDS if (directory / name).is_file()]  # the last checkpoint was there before them
        place = self._place = self._place or Place.of(self.address)
        if not self._known:
            self._look(place)
        self._refuse_to_go_back()
        for name in sorted(self._files - set(self._small()), key=lambda n: n not in ENDS):
            place.remove(name)
            self._files.discard(name)
            self._sent.pop(name, None)
        tried: set[str] = set()
        while True:
            here = checkpoint.checkpoints(self.run.checkpoints)
            for name in self._small():  # before the checkpoint, whose resume needs the metrics up to it
                if name not in ENDS:
                    self._send(place, name)
            due = next((c for c in here if c.name not in tried and self._differs(c)), None)
            if due is None:
                break
            tried.add(due.name)
            self._copy_checkpoint(place, due)
        for name in ends:
            self._send(place, name)
        self._stay()
        if here and self._whole.get(here[0].name) and not self._differs(here[0]):
            for name in sorted(set(self._whole) - {c.name for c in here}):
                self._sent = {path: mark for path, mark in self._sent.items() if not path.startswith(f"checkpoints/{name}/")}
                place.remove_checkpoint(name)
                del self._whole[name]

    def _look(self, place: Place) -> None:
        """Find out what lies there."""
        found: dict[str, bytes] = {}
        for name in place.checkpoints():
            try:
                found[name] = place.read(f"checkpoints/{name}/{MANIFEST}")
            except FileNotFoundError:
                found[name] = b""
        there = max((step_in(name) for name, manifest in found.items() if manifest), default=-1)
        if there > self._began:
            self._ahead = there
        self._began = math.inf
        self._whole, self._files, self._known = found, place.small(), True

    def _step_here(self) -> int:
        return max((checkpoint.step_of(c) for c in checkpoint.checkpoints(self.run.checkpoints)), default=-1)

    def _refuse_to_go_back(self) -> None:
        here = self._step_here()
        if here < self._ahead:
            at = f"and the run here at step {here}" if here >= 0 else "and the run here has no checkpoint yet"
            raise CheckpointError(
                f"{self.address} is at step {self._ahead:g} already {at}, so nothing is copied before that step; "
                f"to go on from there, stop and run `gptlab runs fetch {self.address}`"
            )
        self._ahead = -1

    def _small(self) -> list[str]:
        """The files beside the checkpoints. Raises FileNotFoundError when the run is gone."""
        directory = self.run.directory
        found = [e.name for e in os.scandir(directory) if is_small(e.name) and e.is_file(follow_symlinks=False)]
        for folder in FOLDERS:
            if (directory / folder).is_dir():
                found += [f"{folder}/{e.name}" for e in os.scandir(directory / folder) if e.is_file() and not e.name.startswith(".")]
        return sorted(found)

    def _mark(self, name: str) -> object:
        """What tells whether a file has changed; None where there is none."""
        try:
            found = (self.run.directory / name).stat()
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns, found.st_ino

    def _send(self, place: Place, name: str) -> None:
        """Copy a small file if it has changed, from a copy of its own: it may grow meanwhile."""
        self._stay()
        mark = self._mark(name)
        if mark is None or self._sent.get(name) == mark:
            return
        self._aside.mkdir(exist_ok=True)
        try:
            shutil.copyfile(self.run.directory / name, self._aside / "small")
        except FileNotFoundError:
            return
        place.put(self._aside / "small", name)
        self._sent[name] = mark
        self._files.add(name)

    def _stay(self) -> None:
        if self._left.is_set():
            raise IOFailure(f"{self.address} was left before all was copied")

    def _manifest(self, folder: Path) -> bytes | None:
        try:
            return (folder / MANIFEST).read_bytes()
        except OSError:
            return None

    def _differs(self, folder: Path) -> bool:
        manifest = self._manifest(folder)
        return manifest is not None and manifest != self._whole.get(folder.name)

    def _lacking(self) -> list[str]:
        if not (self.run.directory / "config.json").is_file():
            return []
        found = [c.name for c in checkpoint.checkpoints(self.run.checkpoints) if self._differs(c)]
        return found + [name for name in self._small() if self._mark(name) != self._sent.get(name)]

    def _copy_checkpoint(self, place: Place, folder: Path) -> None:
        """Copy a checkpoint; one that is deleted or replaced meanwhile, or damaged here, gets no manifest there."""
        source, name = self._hold(folder), folder.name
        manifest = self._manifest(source)
        try:
            files = contents(manifest or b"", str(folder))
        except (ValueError, CheckpointError):  # a good one of its name may lie there: it stays
            return
        if self._whole.get(name):
            place.remove(f"checkpoints/{name}/{MANIFEST}")
        self._whole[name] = b""
        for file, (size, sha256) in files.items():
            self._stay()
            path = f"checkpoints/{name}/{file}"
            try:
                if (source / file).stat().st_size != size:
                    return
                if self._sent.get(path) == sha256:
                    continue
                place.put(source / file, path)
            except FileNotFoundError:
                if (source / file).is_file():
                    raise
                return
            if (there := place.size(path)) not in (size, None):
                raise OSError(f"{path} has {there} bytes there, not {size}")
            self._sent[path] = sha256
        self._stay()
        if manifest is not None and self._manifest(source) == manifest:
            self._aside.mkdir(exist_ok=True)
            (self._aside / "small").write_bytes(manifest)
            place.put(self._aside / "small", f"checkpoints/{name}/{MANIFEST}")
            self._whole[name] = manifest

    def _hold(self, folder: Path) -> Path:
        """A second name for each file of a checkpoint: an upload may take longer than the checkpoint is kept here."""
        own = self._aside / folder.name
        shutil.rmtree(own, ignore_errors=True)
        try:
            own.mkdir(parents=True)
            for file in (folder / MANIFEST, *folder.iterdir()):
                if not (own / file.name).exists():
                    os.link(file, own / file.name)
            # the same inode still: the folder was not replaced by another of its name meanwhile
            return own if (folder / MANIFEST).stat().st_ino == (own / MANIFEST).stat().st_ino else folder
        except OSError:  # deleted by now, or a disk without hard links: it is read where it lies
            return folder
