"""What a report says is so: counts, lengths, duplicates, shares, leaks and rows, of one text, a mix and a stream's beginning."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from gptlab import compose
from gptlab.config.schema import DataConfig
from gptlab.data import overlap, report
from gptlab.data.prepare import prepare
from gptlab.data.sources import Packed, training_rows
from tests.conftest import sentences
from tests.data.test_shard import config_of

TEXTS = [sentences(n % 9 + 1, seed=n) for n in range(60)]


def write(file: Path, texts: list[str | None]) -> Path:
    file.write_text("\n".join(json.dumps({"text": t}) for t in texts))
    return file


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """60 documents, the first eight once more, the very first twice more; two rows without text; then what is held out."""
    return write(tmp_path / "rows.jsonl", [*TEXTS, None, "", *TEXTS[:8], TEXTS[0], *(sentences(4, seed=100 + n) for n in range(10))])


def described(config: DataConfig, packing: str = "concatenate") -> list[report.SourceFigures]:
    return report.describe(prepare(config), 32, packing, 0)


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_the_figures_are_those_of_the_documents(rows_file: Path, tokenizer: str) -> None:
    config = config_of(rows_file, tokenizer, validation_fraction=0.05)
    (found,) = described(config)
    data = prepare(config)
    stream = data.stream("train")
    assert (found.name, found.share, found.tokens) == ("text", 1.0, len(stream))
    counts = data.manifest["splits"]["train"]
    assert (found.documents, found.bytes, found.characters) == (counts["documents"], counts["bytes"], counts["characters"])
    assert found.skipped == {"null": 1, "empty": 1}
    lengths = np.diff([*stream.document_starts(), len(stream)])
    assert found.lengths["0"] == lengths.min()
    assert found.lengths["1"] == lengths.max()
    assert found.lengths["0.5"] == np.median(lengths)
    assert found.lengths["mean"] == pytest.approx(lengths.mean())
    assert sum(n for _, n in found.histogram) == found.documents
    below = 0
    for up_to, count in found.histogram:
        assert count == ((lengths > below) & (lengths <= up_to)).sum()
        below = up_to
    assert found.longer == pytest.approx((lengths > 32).mean())
    assert (found.duplicates, found.searched) == (9, found.documents), "the first document too, before which no border stands"
    assert found.overlap == {"val": 0.0}
    assert found.dropped is None
    json.dumps(asdict(found))


def test_a_leak_into_a_held_out_set_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [sentences(3, seed=n) for n in range(40)]
    file = write(tmp_path / "rows.jsonl", [*texts, *texts[3:7]])
    (found,) = described(config_of(file, "byte", validation_fraction=0.05))
    assert found.overlap["val"] > 0.9
    (tmp_path / "fair.txt").write_text("Nothing here stands anywhere else, not even once, or so one hopes. " * 3)
    (found,) = described(config_of(file, "byte", validation_fraction=0.05, validation={"fair": str(tmp_path / "fair.txt")}))
    assert found.overlap["fair"] == 0.0
    assert overlap.SHARE < 0.9


def test_packing_says_what_it_drops(rows_file: Path) -> None:
    config = config_of(rows_file, "byte")
    (found,) = described(config, "best_fit")
    rows = training_rows(prepare(config), 32, "best_fit", 0)
    assert isinstance(rows, Packed)
    assert found.dropped == pytest.approx(1 - rows.epoch_rows * 33 / found.tokens)
    assert found.dropped is not None
    assert 0 < found.dropped < 1


def test_a_large_text_is_searched_in_part_and_counted_whole(rows_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = described(config_of(rows_file, "byte"))
    monkeypatch.setattr(report, "LOOKED_AT", 3000)
    made = prepare(config_of(rows_file, "byte"))
    (found,) = report.describe(made, 32, "concatenate", 0)
    assert (found.tokens, found.documents, found.lengths) == (whole.tokens, whole.documents, whole.lengths)
    assert 0 < found.searched < whole.searched
    assert len(made.stream("train")) == whole.tokens, "a report changes nothing"


def test_documents_are_drawn_from_the_text_and_rows_are_those_of_training(rows_file: Path) -> None:
    made = prepare(config_of(rows_file, "byte"))
    drawn = list(report.documents(made, 5, seed=1))
    assert len({number for _, number, _ in drawn}) == 5
    order = [*TEXTS, *TEXTS[:8], TEXTS[0]]
    for name, number, text in drawn:
        assert name == "text"
        assert number >= len(order) or text == order[number]
    assert drawn == list(report.documents(made, 5, seed=1))
    assert len(list(report.documents(made, 10**6, seed=1))) == made.manifest["splits"]["train"]["documents"]
    for packing in ("concatenate", "best_fit"):
        found = report.rows(made, 200, packing, 0, 6)
        source = training_rows(made, 200, packing, 0)
        tokens = source.fetch(source.place(np.arange(6)), True).tokens
        for row, expected in zip(found, tokens, strict=True):
            assert "".join(row.parts) == made.tokenizer.decode(expected[:-1].tolist())
        assert max(len(r.parts) for r in found) > 1


def test_a_mix_is_described_source_by_source(rows_file: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(sentences(100, seed=9))
    config = compose([
        "data=mix", "data/tokenizer=byte", "+data/corpus@data.corpus.sources.rows=text", f"data.corpus.sources.rows.path={rows_file}",
        "+data/corpus@data.corpus.sources.b=text", f"data.corpus.sources.b.path={tmp_path / 'b.txt'}",
        "+data/corpus@data.corpus.sources.off=text", f"data.corpus.sources.off.path={tmp_path / 'b.txt'}",
        "+data.corpus.weights.rows=3", "+data.corpus.weights.off=0",
    ]).data  # fmt: skip
    made = prepare(config)
    found = {f.name: f for f in report.describe(made, 32, "concatenate", 0)}
    assert {n: f.share for n, f in found.items()} == {"rows": 0.75, "b": 0.25, "off": 0.0}
    assert found["rows"].tokens == len(made.parts["rows"].stream("train"))
    assert set(found["b"].overlap) == {"rows", "b", "off"}
    rows = report.rows(made, 32, "concatenate", 0, 40)
    assert {r.source for r in rows} == {"rows", "b"}
    for row in rows:
        file = rows_file if row.source == "rows" else tmp_path / "b.txt"
        text = file.read_text() if row.source == "b" else "".join(json.loads(line)["text"] or "" for line in file.read_text().splitlines())
        assert max(row.parts, key=len) in text
