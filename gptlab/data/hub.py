"""Data sets of the Hugging Face hub, read row by row from one pinned commit: nothing is lost or read twice when it goes on."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any

from gptlab.config.errors import ConfigError, DataError, GptlabError, IOFailure
from gptlab.config.registry import register, suggest
from gptlab.data.amount import amount
from gptlab.data.corpus import Cursor, home
from gptlab.data.hub_rows import Rows, ahead, from_parquet, from_stream, texts_of
from gptlab.data.reader import Piece

ASK_WAITS = (1.0, 3.0)  # seconds between the first questions: a hub that is not there is told within half a minute
READ_WAITS = (5.0, 15.0, 30.0, 60.0)  # seconds before a broken stream is opened anew, after the client's own retries
TIMEOUT = 8.0  # seconds
ELSEWHERE = "what is prepared already needs no network; else set HF_ENDPOINT to a mirror, or use data=text data.corpus.path=FILE"


@register("data/corpus", "hub")
class Hub:
    """A data set of the Hugging Face hub, streamed: its commit is pinned at first use, under $GPTLAB_HOME/hub."""

    def __init__(
        self,
        *,
        dataset: str,
        config: str = "",
        split: str = "train",
        column: str = "text",
        revision: str = "",
        tokens: str = "",
        held_out: str = "4M",
        validation_split: str = "",
    ) -> None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", dataset):
            raise ConfigError(f"data.corpus.dataset={dataset} is not of the form OWNER/NAME, as in HuggingFaceFW/fineweb-edu")
        if validation_split and validation_split == split:
            raise ConfigError(f"data.corpus.validation_split={validation_split} is the split that is trained on; take another, or none")
        self.dataset, self.config, self.split, self.column = dataset, config, split, column
        self.revision, self.validation_split = revision or "main", validation_split
        self.name = re.sub(r"[^a-z0-9]+", "-", f"{dataset.split('/')[1]}-{config}".lower()).strip("-")
        self.limit = amount("data.corpus.tokens", tokens) if tokens else None
        self.held_out_characters = 0 if validation_split else amount("data.corpus.held_out", held_out)
        self.validation = HeldOut(self) if validation_split else None
        self._commit, self._begun = "", False  # begun: rows were read before, so that something is prepared
        self._builder: Any = None

    def fingerprint(self) -> dict[str, Any]:
        """What tells this text from another; not `tokens`, since a prepared folder can grow. Asks the hub once, ever, for the commit."""
        return {
            "dataset": self.dataset,
            "config": self.config,
            "split": self.split,
            "column": self.column,
            "revision": self.commit(),
            "held_out": self.held_out_characters,
            "validation_split": self.validation_split,
        }

    def commit(self) -> str:
        """The commit all rows are read from: `revision` itself, or what it meant when it was first asked for.

        Raises ConfigError when the hub has no such data set or revision, IOFailure when it cannot be asked, and DataError.
        """
        if not self._commit:
            if re.fullmatch(r"[0-9a-f]{40}", self.revision):
                self._commit = self.revision
            elif self._pin_file.is_file():
                self._commit = _read_pin(self._pin_file)
            else:
                self._commit = _write_pin(self._pin_file, self.dataset, self.revision, self._ask())
        return self._commit

    @property
    def pinned(self) -> bool:
        """Whether its commit is known without asking the hub."""
        return bool(re.fullmatch(r"[0-9a-f]{40}", self.revision)) or self._pin_file.is_file()

    def pin(self, commit: str) -> str:
        """Pin this data set to a commit, unless a commit is named or pinned already; the one that holds. Raises DataError for no commit."""
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise DataError(f"{commit!r} is no commit of {self.dataset}")
        if self.revision != commit and not self._pin_file.is_file():
            _write_pin(self._pin_file, self.dataset, self.revision, commit)
        return self.commit()

    @property
    def _pin_file(self) -> Path:
        at = "" if self.revision == "main" else "@" + re.sub(r"[^\w.-]+", "-", self.revision)
        return home() / "hub" / f"{self.dataset.replace('/', '--')}{at}.json"

    def pieces(self) -> Iterator[Piece]:
        """Every row as a document of its own."""
        return (piece for piece, _ in self.pieces_from(None))

    def pieces_from(self, cursor: Cursor) -> Iterator[tuple[Piece, Cursor]]:
        """The rows after a cursor (None: all), each with the cursor behind it. A row without text is a piece that says why.

        Raises ConfigError for what the hub has not or does not give, IOFailure when it does not answer, DataError for a broken file.
        """
        return self._pieces(self.split, cursor)

    def validation_pieces_from(self, cursor: Cursor) -> Iterator[tuple[Piece, Cursor]]:
        """The same over `validation_split`; nothing when there is none."""
        return self._pieces(self.validation_split, cursor) if self.validation_split else iter(())

    def records(self, *, validation: bool = False) -> Iterator[dict[str, Any]]:
        """Every row with all columns, of the split or of `validation_split`. Raises as `pieces_from`; it does not go on after a break."""
        split = self.validation_split if validation else self.split
        try:
            self._reader(split)  # refuses a split that is not there
            for row in self._builder.as_streaming_dataset(split=split):
                self._begun = True
                yield dict(row)
        except GptlabError:
            raise
        except Exception as error:
            told = self._told(error)
            if told is None:
                raise
            raise told from error

    def _pieces(self, split: str, cursor: Cursor) -> Iterator[tuple[Piece, Cursor]]:
        closed = threading.Event()
        with closing(ahead(self._rows(split, cursor, closed), closed)) as batches:
            for place, first, values in batches:
                for row, text in enumerate(texts_of(values), first + 1):
                    if isinstance(text, str) and text and not text.isspace():
                        yield Piece(text, True), {**place, "row": row}
                    else:
                        reason = "null" if text is None else "broken" if isinstance(text, bytes) else "empty"
                        yield Piece("", True, reason), {**place, "row": row}

    def _rows(self, split: str, cursor: Cursor, closed: threading.Event) -> Generator[Rows, None, None]:
        """Rows from a cursor on, the stream opened anew where it broke off."""
        self._begun = self._begun or cursor is not None
        waits: list[float] = []  # what never gave a row is not asked again: the client has done so
        while True:
            try:
                for rows in self._reader(split)(cursor):
                    yield rows
                    cursor = {**rows.place, "row": rows.first + len(rows.values)}
                    waits, self._begun = list(READ_WAITS), True
                return
            except GptlabError:
                raise
            except Exception as error:
                told = self._told(error)
                if told is None:
                    raise
                if not waits or not _passing(error):
                    raise told from error
                reason = type(error).__name__
            wait = waits.pop(0)
            print(f"gptlab: {self.dataset} does not come ({reason}); trying again in {wait:.0f} s", file=sys.stderr, flush=True)
            if closed.wait(wait):
                return

    def _reader(self, split: str) -> Callable[[Cursor], Iterator[Rows]]:
        """What reads a split from a cursor on. Raises ConfigError when there is no such split."""
        if self._builder is None:
            self._builder = self._load()
        files = {str(name): [str(f) for f in found] for name, found in self._builder.config.data_files.items()}
        if split not in files:
            key = "validation_split" if split == self.validation_split else "split"
            raise ConfigError(f"data.corpus.{key}={split}: {self._called} has the splits {', '.join(files)}{suggest(split, files)}")
        if all(f.endswith(".parquet") for f in files[split]):
            return partial(from_parquet, files[split], self._called, self.column)
        return partial(from_stream, self._builder, split, self._called, self.column)

    @property
    def _called(self) -> str:
        return f"{self.dataset} ({self.config})" if self.config else self.dataset

    def _ask(self) -> str:
        """The commit that the revision stands for now. Raises ConfigError or IOFailure."""
        from huggingface_hub import HfApi

        _quiet()
        for wait in (*ASK_WAITS, None):
            try:
                return str(HfApi().dataset_info(self.dataset, revision=self._commit or self.revision, timeout=TIMEOUT).sha)
            except Exception as error:
                told = self._told(error)
                if told is None:
                    raise
                if wait is None or not _passing(error):
                    raise told from error
                time.sleep(wait)
        raise AssertionError("the last round returns or raises")

    def _load(self) -> Any:
        """The builder of `datasets` that knows the files. Raises ConfigError when there is no such configuration."""
        import datasets

        commit = self.commit()
        self._ask()  # answers within seconds, and says plainly what is wrong; `datasets` waits for minutes and hides it
        # The address keeps a folder of the same name from being taken for the data set.
        address = f"hf://datasets/{self.dataset}"
        try:
            builder = datasets.load_dataset_builder(address, self.config or None, revision=commit)
        except (ValueError, RuntimeError) as error:
            if "script" in str(error):
                raise ConfigError(
                    f"data.corpus.dataset={self.dataset} is a program, not files; "
                    "data.corpus.revision=refs/convert/parquet is the hub's own copy of it as files"
                ) from error
            names = datasets.get_dataset_config_names(address, revision=commit)
            if self.config in names or (not self.config and len(names) == 1):
                raise DataError(f"{self._called} at commit {commit[:12]} cannot be loaded ({error})") from error
            known = f"{self.dataset} has the configurations {', '.join(names)}{suggest(self.config, names)}"
            raise ConfigError(f"data.corpus.config={self.config}: {known}") from error
        if not builder.config.data_files:  # a copy that `datasets` keeps, of whatever commit, in place of the hub's
            raise IOFailure(f"{self.dataset} could not be had from the hub at commit {commit[:12]}; {ELSEWHERE}")
        return builder

    def _told(self, error: Exception) -> GptlabError | None:
        """The error as a sentence for the user; None for one that is a defect of ours."""
        import datasets.exceptions as missing
        from huggingface_hub import constants, errors

        chain = _chain(error)

        def among(*kinds: type[BaseException]) -> bool:
            return any(isinstance(e, kinds) for e in chain)

        if among(errors.OfflineModeIsEnabled):
            return IOFailure(f"{self.dataset} was not asked for, since HF_HUB_OFFLINE is set: unset it; {ELSEWHERE}")
        if among(errors.GatedRepoError) or any(isinstance(e, missing.DatasetNotFoundError) and "gated" in str(e) for e in chain):
            page = f"https://huggingface.co/datasets/{self.dataset}"
            return ConfigError(
                f"data.corpus.dataset={self.dataset} is gated: accept its terms at {page}, then `hf auth login` or set HF_TOKEN"
            )
        if among(errors.RevisionNotFoundError):
            pinned = (
                f", which {self._pin_file} holds; delete that file to take the newest" if self._commit and self._pin_file.is_file() else ""
            )
            return ConfigError(f"data.corpus.revision={self._commit or self.revision}: {self.dataset} has no such revision{pinned}")
        if among(errors.RepositoryNotFoundError, missing.DatasetNotFoundError):
            return ConfigError(
                f"data.corpus.dataset={self.dataset}: the hub has no such data set, or it is private; "
                "check the owner and the spelling, or for a private one `hf auth login` or set HF_TOKEN"
            )
        if among(missing.DataFilesNotFoundError):  # an empty data set too
            return ConfigError(f"data.corpus.dataset={self.dataset} holds no files with rows of text that can be read")
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if not _passing(error) and among(missing.DatasetsError, UnicodeDecodeError):
            return DataError(f"{self._called} at commit {self._commit[:12]} could not be read ({reason})")
        if self._begun and among(OSError, *network_errors()):
            return IOFailure(
                f"{constants.ENDPOINT} stopped giving {self.dataset} ({reason}); "
                "what was prepared is kept, and the same command goes on from there"
            )
        if among(OSError, *network_errors()):
            return IOFailure(f"{self.dataset} could not be had from {constants.ENDPOINT} ({reason}); {ELSEWHERE}")
        return None


class HeldOut:
    """The validation split of a data set, as a corpus."""

    def __init__(self, hub: Hub) -> None:
        self.name, self.pieces_from, self.fingerprint = f"{hub.name}-{hub.validation_split}", hub.validation_pieces_from, hub.fingerprint

    def pieces(self) -> Iterator[Piece]:
        """Every row as a document of its own."""
        return (piece for piece, _ in self.pieces_from(None))


@cache
def _quiet() -> None:
    """Keep the libraries' bars and warnings from the terminal, and their waits short: a broken stream is opened anew by us."""
    import datasets
    import huggingface_hub.utils as hub

    for library, variable in ((hub, "HF_HUB"), (datasets, "DATASETS")):
        if f"{variable}_VERBOSITY" not in os.environ:
            library.logging.set_verbosity_error()
    for library, variable in ((hub, "HF_HUB"), (datasets, "HF_DATASETS")):
        if f"{variable}_DISABLE_PROGRESS_BARS" not in os.environ:
            library.disable_progress_bars()
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.append(at)
        at = at.__cause__ or at.__context__
    return found


def network_errors() -> tuple[type[BaseException], ...]:
    """The errors of the HTTP library beneath the hub's client, which has changed it twice."""
    from huggingface_hub.errors import HfHubHTTPError

    own = ("builtins", "huggingface_hub")
    return tuple(kind for kind in HfHubHTTPError.__mro__ if kind.__module__.split(".")[0] not in own)


def _passing(error: BaseException) -> bool:
    """Whether the same request may well succeed a little later."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    for e in _chain(error):
        if isinstance(e, OfflineModeIsEnabled):
            return False
        if isinstance(e, HfHubHTTPError):
            return e.response.status_code in (408, 429) or e.response.status_code >= 500
        if isinstance(e, (*network_errors(), ConnectionError, TimeoutError)):
            return True
    return False


def _read_pin(file: Path) -> str:
    try:
        commit = json.loads(file.read_text(encoding="utf-8"))["commit"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} cannot be read ({type(error).__name__}: {error}); delete it to pin the newest commit") from error
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise DataError(f"{file} holds no commit; delete it to pin the newest")
    return commit


def _write_pin(file: Path, dataset: str, revision: str, commit: str) -> str:
    content = json.dumps({"dataset": dataset, "revision": revision, "commit": commit}, indent=1) + "\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pin-", dir=file.parent) as folder:
            (Path(folder) / file.name).write_text(content, encoding="utf-8")
            (Path(folder) / file.name).replace(file)
    except OSError as error:
        raise IOFailure(f"{file} could not be written ({error.strerror})") from error
    return commit
