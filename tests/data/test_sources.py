"""What training sees and what is measured, by text: rows, packing, document borders, tasks; bits per byte by hand; shards checked once."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gptlab import compose, train
from gptlab.config.errors import ConfigError, DataError
from gptlab.config.resolve import Machine, resolve
from gptlab.config.schema import Config
from gptlab.data import shard
from gptlab.data.loader import HELD_OUT, Loader, held_out_batches
from gptlab.data.prepare import prepare
from gptlab.data.prepared import Prepared
from gptlab.data.shard import TokenStream, file_hash
from gptlab.data.sources import Generated, Packed, Windows, training_rows
from gptlab.model.transformer import new_model
from gptlab.runner import validation
from gptlab.runner.run import Run
from gptlab.runner.trainer import Trainer
from tests.tiny import tiny

TASKS = ["addition", "copy", "dyck", "induction", "recall"]
TOKENIZERS = ["char", "byte", "gpt2", "bpe"]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Documents of all lengths, each with a number of its own."""
    draw = random.Random(0)
    lines = []
    for number in range(150):
        words = " ".join(draw.choices(["haus", "größe", "light", "of", "the", "👩‍👩‍👧"], k=draw.randint(1, 60)))
        lines.append(json.dumps({"text": f"{number}: {words}"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def options(tokenizer: str) -> list[str]:
    return [f"data/tokenizer={tokenizer}", *(["data.tokenizer.vocabulary=400"] if tokenizer == "bpe" else [])]


def resolved(file: Path, tokenizer: str, *more: str) -> Config:
    return resolve(compose(tiny(file, *options(tokenizer), *more)), Machine(devices=("cpu",)))


# Packing and documents


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_packed_rows_begin_with_documents_and_documents_are_told_by_their_borders(
    rows_file: Path, tiktoken_cache: Path, tokenizer: str
) -> None:
    config = resolved(rows_file, tokenizer)
    data = prepare(config.data)
    context = 40
    packed = training_rows(data, context, "best_fit", 0)
    assert isinstance(packed, Packed)
    place = np.arange(packed.epoch_rows)
    fetched = packed.fetch(place, True)
    assert fetched.document is not None
    own, stream = data.tokenizer, data.stream("train")
    starts = stream.document_starts().tolist()
    ends = [*starts[1:], len(stream)]
    documents = [tuple(stream.window(a, b - a).tolist()) for a, b in zip(starts, ends, strict=True)]
    used = 0
    for tokens, document in zip(fetched.tokens.tolist(), fetched.document.tolist(), strict=True):
        assert document[0] == 0
        cuts = [0, *(i for i in range(1, context) if document[i] != document[i - 1])]
        parts = [tuple(tokens[a:b]) for a, b in zip(cuts, [*cuts[1:], context + 1], strict=True)]
        for part in parts[:-1]:
            assert part in documents, "all but the last of a row are whole, unless cut to fill it"
        assert any(d[: len(parts[-1])] == parts[-1] or d[: len(parts[-1]) - 1] == parts[-1][:-1] for d in documents)
        used += len(tokens)
    dropped, total = packed.dropped()
    assert total == len(stream)
    assert used == total - dropped
    assert "0: " in own.decode(documents[0])


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_windows_tell_documents_by_their_borders(rows_file: Path, tokenizer: str) -> None:
    data = prepare(resolved(rows_file, tokenizer).data)
    rows = training_rows(data, 50, "concatenate", 0)
    place = rows.place(np.arange(100))
    fetched = rows.fetch(place, True)
    starts = set(data.stream("train").document_starts().tolist())
    assert fetched.document is not None
    for first, document in zip(place.tolist(), fetched.document.tolist(), strict=True):
        expected, number = [], 0
        for at in range(first, first + 50):
            number += at in starts and at > first
            expected.append(number)
        assert document == expected
    assert any(d[-1] > 1 for d in fetched.document.tolist())
    assert rows.fetch(place, False).document is None


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_best_fit_with_document_masks_trains(rows_file: Path, tiktoken_cache: Path, tokenizer: str) -> None:
    more = ["data.packing=best_fit", "model/attention=documents", *options(tokenizer)]
    done = train(compose(tiny(rows_file, *more, steps=6)))
    assert done.state == "done"
    summary = json.loads((done.run.directory / "done.json").read_text())["summary"]
    assert math.isfinite(summary["val/loss"])


def test_a_model_with_document_masks_is_given_documents_in_training_and_validation(
    rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for attention, expected in (("documents", True), ("multihead", False)):
        config = resolved(rows_file, "byte", f"model/attention={attention}", "data.packing=best_fit")
        data = prepare(config.data)
        trainer = Trainer(config, data, Run(tmp_path / attention))
        assert (trainer.loader.batch(0).document is not None) == expected
        seen: list[bool] = []
        plain = type(trainer.model).forward

        def forward(self: Any, tokens: Any, *, document: Any = None, plain: Any = plain, seen: Any = seen, **rest: Any) -> Any:
            seen.append(document is not None)
            return plain(self, tokens, document=document, **rest)

        monkeypatch.setattr(type(trainer.model), "forward", forward)
        validation.measure(trainer.model, data, config)
        monkeypatch.setattr(type(trainer.model), "forward", plain)
        assert set(seen) == {expected}


def test_text_that_fills_no_row_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("too little")
    data = prepare(resolved(tmp_path / "a.txt", "byte").data)
    with pytest.raises(DataError, match=r"no documents of the training text fill a row of 17 tokens"):
        training_rows(data, 16, "best_fit", 0)
    with pytest.raises(ConfigError, match=r"data\.packing=tight is not one of concatenate, best_fit"):
        prepare(resolved(tmp_path / "a.txt", "byte", "data.packing=tight").data)


# Generated tasks


@pytest.mark.parametrize("task", TASKS)
def test_a_task_trains_and_says_its_accuracy(task: str) -> None:
    done = train(compose([
        f"data={task}", "model.width=16", "model.depth=1", "model.heads=2", "model.context_length=64", "trainer.batch_tokens=256",
        "trainer.budget=6steps", "callbacks.samples.tokens=4", "tracker=none",
    ]))  # fmt: skip
    summary = json.loads((done.run.directory / "done.json").read_text())["summary"]
    assert 0 <= summary["val/accuracy"] <= 1
    assert math.isfinite(summary["val/loss"])
    assert "val/bits_per_byte" not in summary, "a task's tokens stand for no text"


@pytest.mark.parametrize("task", TASKS)
def test_no_row_of_a_task_is_trained_on_and_measured(task: str) -> None:
    data = prepare(compose([f"data={task}"]).data)
    assert data.task is not None
    trained = training_rows(data, 64, "concatenate", 0)
    assert isinstance(trained, Generated)
    rows = {tuple(r) for r in trained.fetch(trained.place(np.arange(2000)), False).tokens.tolist()}
    assert len(rows) > 1990, "rows are drawn anew each time"
    batches = list(held_out_batches(data, "val", 64, 0, 64))
    held = {(*b.tolist(), int(t[-1])) for batch in batches for b, t in zip(batch.inputs, batch.targets, strict=True)}
    assert len(held) > 500
    assert not rows & held
    again = list(held_out_batches(data, "val", 64, 0, 17))
    assert {(*b.tolist(), int(t[-1])) for batch in again for b, t in zip(batch.inputs, batch.targets, strict=True)} == held
    other = Generated(data.task, 64, 5, HELD_OUT).fetch(np.arange(64), False)
    assert not {tuple(r) for r in other.tokens.tolist()} & held


def test_rows_of_a_task_do_not_depend_on_how_they_are_asked_for() -> None:
    data = prepare(compose(["data=recall"]).data)
    assert data.task is not None
    whole = Generated(data.task, 64, 3).fetch(np.arange(1000), False)
    draw = np.random.default_rng(0)
    source = Generated(data.task, 64, 3)
    for _ in range(20):
        index = draw.permutation(1000)[:37]
        found = source.fetch(index, False)
        assert (found.tokens == whole.tokens[index]).all()
        assert found.scored is not None
        assert whole.scored is not None
        assert (found.scored == whole.scored[index]).all()


def test_a_task_needs_its_tokeniser_and_room_for_an_example() -> None:
    with pytest.raises(ConfigError, match=r"data/corpus=copy is made of single characters: it needs data/tokenizer=char"):
        train(compose(["data=copy", "data/tokenizer=byte", "tracker=none"]))
    with pytest.raises(ConfigError, match=r"model\.context_length=4 is too short for an example of data/corpus=recall"):
        train(compose(["data=recall", "model.context_length=4", "trainer.batch_tokens=16", "tracker=none", "trainer.budget=2steps"]))


def test_the_accuracy_of_a_task_is_that_of_the_likeliest_scored_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(
        compose(["data=recall", "model.width=16", "model.depth=1", "model.heads=2", "model.context_length=64"]), Machine(devices=("cpu",))
    )
    data = prepare(config.data)
    model = new_model(config.model, data.vocabulary, 0)
    right = scored = 0
    nats = 0.0
    for batch in held_out_batches(data, "val", 64, 0, 8):
        assert batch.weight is not None
        logits = model(batch.inputs)
        here = batch.weight > 0
        right += int((logits.argmax(-1) == batch.targets)[here].sum())
        nats += float(F.cross_entropy(logits[here], batch.targets[here], reduction="sum"))
        scored += int(here.sum())
    found = validation.measure(model, data, config)
    assert found["val/accuracy"] == pytest.approx(right / scored)
    assert found["val/loss"] == pytest.approx(nats / scored, rel=1e-5)
    assert 0 < right < scored


# Bits per byte


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_bits_per_byte_are_nats_over_the_bytes_of_the_scored_text(rows_file: Path, tiktoken_cache: Path, tokenizer: str) -> None:
    config = resolved(rows_file, tokenizer)
    data = prepare(config.data)
    model = new_model(config.model, data.vocabulary, 0)
    stream = data.stream("val")
    tokens = torch.from_numpy(stream.window(0, len(stream)))
    nats = 0.0
    for start in range(0, len(tokens) - 1, 16):
        inputs, targets = tokens[start : start + 17][:-1], tokens[start + 1 : start + 17]
        nats += float(F.cross_entropy(model(inputs[None])[0].double(), targets, reduction="sum"))
    own = data.tokenizer
    first = own.byte_lengths()[int(tokens[0])]
    documents = [json.loads(line)["text"] for line in rows_file.read_text().splitlines()]
    text = "".join(documents)[-data.manifest["splits"]["val"]["characters"] :]
    borders = data.manifest["splits"]["val"]["documents"] - 1
    size = len(text.encode()) - first + (2 * borders if tokenizer == "char" else 0)  # of characters, the border is text too
    found = validation.measure(model, data, config)
    assert found["val/bits_per_byte"] == pytest.approx(nats / (size * math.log(2)), rel=1e-5)
    assert found["val/loss"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)


def test_further_sets_are_measured_beside_val(rows_file: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("Etwas anderes, das nirgends sonst steht. " * 20)
    config = resolved(rows_file, "byte", f"+data.validation.more={tmp_path / 'more.txt'}")
    data = prepare(config.data)
    model = new_model(config.model, data.vocabulary, 0)
    found = validation.measure(model, data, config)
    assert set(found) == {"val/loss", "val/bits_per_byte", "val/more/loss", "val/more/bits_per_byte"}
    plain = resolved(rows_file, "byte")
    assert validation.measure(model, prepare(plain.data), plain)["val/loss"] == found["val/loss"]


# Shards


@pytest.fixture
def made(rows_file: Path, empty_home: Path) -> Prepared:
    return prepare(resolved(rows_file, "byte").data)


def test_a_large_shard_is_hashed_again_only_when_its_size_or_date_changes(
    made: Prepared, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "ALWAYS_HASHED", 1000)
    hashed: list[str] = []

    def counted(file: Path) -> str:
        hashed.append(file.name)
        return file_hash(file)

    monkeypatch.setattr(shard, "file_hash", counted)

    def opened() -> list[str]:
        hashed.clear()
        prepare(resolved(rows_file, "byte").data).stream("train")
        return hashed

    opened()
    assert "train-00000.bin" not in opened(), "its size and date are those that were seen"
    file = made.folder / "train-00000.bin"
    os.utime(file, ns=(5, 5))
    assert "train-00000.bin" in opened()
    assert "train-00000.bin" not in opened()
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    for _ in range(2):
        with pytest.raises(DataError, match=r"has sha256 .* its manifest says"):
            opened()
    file.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"has [\d,]+ bytes, its manifest says"):
        opened()
    monkeypatch.setattr(shard, "ALWAYS_HASHED", 1 << 30)
    content[7] ^= 1
    file.write_bytes(content)
    assert opened() == opened() != [], "a small one is hashed each time"


def test_an_index_that_was_altered_is_refused(made: Prepared, rows_file: Path) -> None:
    file = made.folder / "train.documents"
    content = bytearray(file.read_bytes())
    content[9] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"train\.documents has sha256"):
        prepare(resolved(rows_file, "byte").data).stream("train")


def test_a_record_with_an_id_beyond_the_vocabulary_is_refused(made: Prepared, rows_file: Path) -> None:
    manifest = json.loads((made.folder / "manifest.json").read_text())
    manifest["splits"]["train"]["largest"] = 257
    (made.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"the token id 257 is beyond the .*vocabulary of 257") as error:
        prepare(resolved(rows_file, "byte").data)
    assert error.value.code == 3


READER = """
import resource, sys
from pathlib import Path
import numpy as np
from gptlab.data.loader import Loader
from gptlab.data.shard import TokenStream
from gptlab.data.sources import Windows
folder, tokens = Path(sys.argv[1]), int(sys.argv[2])
shards = [{"file": f"{i}.bin", "tokens": tokens} for i in range(4)]
split = {"shards": shards, "index": {"file": "train.documents"}, "documents": 1}
loader = Loader(Windows(TokenStream([(folder, split)], np.dtype("<u2")), 1024, 0), 64, documents=False)
loader.batch(0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for step in range(600):
    loader.batch(step * 977 % 3000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_reading_a_large_stream_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    tokens = 100_000_000
    for number in range(4):
        with (tmp_path / f"{number}.bin").open("wb") as opened:
            opened.truncate(2 * tokens)  # sparse: 800 MB that take no disk
    (tmp_path / "train.documents").write_bytes(bytes(8))
    place = Path(__file__).parents[2]
    called = [sys.executable, "-c", READER, str(tmp_path), str(tokens)]
    done = subprocess.run(called, cwd=place, capture_output=True, text=True, check=True)
    grown = int(done.stdout) / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    assert grown < 60, f"{grown:.0f} MB more after reading 80 MB of windows all over 800 MB"


def test_a_limit_cuts_tokens_and_documents(made: Prepared) -> None:
    split = made.manifest["splits"]["train"]
    whole, cut = (TokenStream([(made.folder, split)], made.dtype, limit) for limit in (None, 1000))
    assert len(cut) == 1000
    assert cut.document_starts().tolist() == [s for s in whole.document_starts().tolist() if s < 1000]
    rows = Windows(cut, 16, 0)
    assert int(rows.place(np.arange(rows.epoch_rows)).max()) + 17 <= 1000
    assert Loader(rows, 4).epoch_tokens <= 1000


def test_options_of_data_that_would_change_nothing_are_refused(rows_file: Path, tmp_path: Path) -> None:
    """A generated task has no text to filter, to pack or to hold out."""
    for more in (f"+data.validation.more={rows_file}", "data.filter.exact_duplicates=true", "data.packing=best_fit"):
        with pytest.raises(ConfigError, match=more.split("=")[0].split(".")[1]):
            prepare(compose(["data=copy", more]).data)
