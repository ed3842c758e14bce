"""Mixes: exact shares, every row of each source once an epoch, each source measured by itself, equal text for the tokeniser."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptlab import compose, train
from gptlab.config.errors import ConfigError, DataError
from gptlab.config.registry import component
from gptlab.config.resolve import Machine, resolve
from gptlab.config.schema import DataConfig
from gptlab.data.learn import sample, tokenizer_file
from gptlab.data.loader import Loader
from gptlab.data.mix import Mix
from gptlab.data.order import MIX_ROWS, quotas
from gptlab.data.prepare import prepare
from gptlab.data.prepared import Prepared
from gptlab.data.sources import Mixed, training_rows
from gptlab.model.transformer import new_model
from gptlab.runner import validation
from tests.conftest import sentences
from tests.data.test_shard import ids_of

SIZES = {"a": 300, "b": 60, "c": 150}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {}
    for number, (name, count) in enumerate(SIZES.items()):
        found[name] = tmp_path / f"{name}.txt"
        found[name].write_text(sentences(count, seed=number) + name.upper() * 20)
    return found


def config(files: dict[str, Path], tokenizer: str = "byte", weights: dict[str, float] | None = None, **values: Any) -> DataConfig:
    text: Any = component("data/corpus", "text").options
    mix: Any = component("data/corpus", "mix").options
    own = {"vocabulary": 300, "characters": str(values.pop("characters", "100M"))} if tokenizer == "bpe" else {}
    sources = {name: text(path=str(file)) for name, file in files.items()}
    chosen: Any = component("data/tokenizer", tokenizer).options
    return DataConfig(corpus=mix(sources=sources, weights=weights or {}), tokenizer=chosen(**own), **values)


def overrides(files: dict[str, Path], *more: str, tokenizer: str = "byte") -> list[str]:
    found = ["data=mix", f"data/tokenizer={tokenizer}"]
    for name, file in files.items():
        found += [f"+data/corpus@data.corpus.sources.{name}=text", f"data.corpus.sources.{name}.path={file}"]
    return [
        *found, "model.width=16", "model.depth=1", "model.heads=2", "model.context_length=16", "trainer.batch_tokens=64",
        "trainer.budget=30steps", "trainer.log_every=5", "callbacks.samples.tokens=4", "tracker=none", *more,
    ]  # fmt: skip


# The order


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_shares_are_exact_in_every_4096_rows_and_each_row_comes_once_an_epoch(files: dict[str, Path], packing: str) -> None:
    made = prepare(config(files, weights={"a": 5, "b": 1.5}))
    context = 7
    rows = training_rows(made, context, packing, seed=3)
    assert isinstance(rows, Mixed)
    assert rows.share == quotas([5 / 7.5, 1.5 / 7.5, 1 / 7.5])
    assert sum(rows.share) == MIX_ROWS
    place = rows.place(np.arange(3 * MIX_ROWS))
    for block in range(3):
        assert np.bincount(place[block * MIX_ROWS : (block + 1) * MIX_ROWS, 0], minlength=3).tolist() == rows.share
    first = place[:MIX_ROWS, 0]
    assert max(len(run) for run in "".join(map(str, first)).split("1")) < 150, "the sources come in turn, not one after another"
    for number, part in enumerate(rows.parts):
        drawn = place[place[:, 0] == number, 1]
        alone = part.place(np.arange(len(drawn)))
        assert Counter(drawn.tolist()) == Counter(alone.tolist())
        # Within a block the order is free, so a whole epoch is visited once, and another block's rows of it at most once more.
        seen = Counter(drawn[: part.epoch_rows + rows.share[number]].tolist())
        assert len(seen) >= part.epoch_rows


def test_a_batch_of_a_mix_is_a_function_of_its_step(files: dict[str, Path]) -> None:
    made = prepare(config(files))
    one, two = (Loader(training_rows(made, 16, "concatenate", 0), 4) for _ in range(2))
    forwards = [one.batch(s) for s in range(150)]
    for step in (149, 70, 3, 64, 63, 0, 128):
        assert torch.equal(two.batch(step).inputs, forwards[step].inputs)
    capitals = {ord(n.upper()): n for n in "AB"}
    rows = [set(row) for b in forwards for row in b.inputs.tolist()]
    assert not any(len({capitals[t] for t in row if t in capitals and list(row).count(t) > 3}) > 1 for row in rows)


def test_rows_are_those_of_their_source(files: dict[str, Path]) -> None:
    made = prepare(config(files))
    rows = training_rows(made, 16, "concatenate", 5)
    place = rows.place(np.arange(500))
    fetched = rows.fetch(place, True)
    assert fetched.document is not None
    assert isinstance(rows, Mixed)
    for row in range(500):
        part = rows.parts[int(place[row, 0])]
        own = part.fetch(place[row : row + 1, 1], True)
        assert own.document is not None
        assert fetched.tokens[row].tolist() == own.tokens[0].tolist()
        assert fetched.document[row].tolist() == own.document[0].tolist()


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5], [1 / 3] * 3, [0.99999, 0.00001], [1e-9] * 5 + [1 - 5e-9], [0.1] * 10])
def test_quotas_sum_up_and_leave_nobody_out(weights: list[float]) -> None:
    found = quotas(weights)
    assert sum(found) == MIX_ROWS
    assert min(found) >= 1
    assert all(abs(f - w * MIX_ROWS) < 6 for f, w in zip(found, weights, strict=True))


# What does not depend on the weights


def test_weights_change_neither_the_held_out_sets_nor_the_tokeniser(files: dict[str, Path], empty_home: Path) -> None:
    made = [prepare(config(files, "bpe", weights)) for weights in ({}, {"a": 9.0}, {"b": 0.0})]
    assert len({json.dumps(m.held_out) for m in made}) == 1
    assert len({m.manifest["tokenizer"]["sha256"] for m in made}) == 1
    assert len({str(p.folder) for m in made for p in m.parts.values()}) == 3, "each source is prepared once"
    assert len({m.hash for m in made}) == 3
    assert made[1].hash == prepare(config(files, "bpe", {"a": 18.0, "b": 2.0, "c": 2.0})).hash, "shares count, not their scale"
    assert list(empty_home.glob("tokenizers/bpe-*.json")).__len__() == 1


def test_a_source_of_weight_0_is_measured_and_not_trained_on(files: dict[str, Path]) -> None:
    made = prepare(config(files, weights={"b": 0}))
    rows = training_rows(made, 16, "concatenate", 0)
    assert isinstance(rows, Mixed)
    assert rows.names == ["a", "c"]
    assert made.validation_names == ["val", "a", "b", "c"]
    done = train(compose(overrides(files, "+data.corpus.weights.b=0")))
    summary = json.loads((done.run.directory / "done.json").read_text())["summary"]
    assert math.isfinite(summary["val/b/loss"])
    assert "data/share/b" not in summary or summary["data/share/b"] == 0


# What is measured


def test_every_source_is_measured_and_val_is_all_of_them_by_tokens(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("Etwas ganz anderes, das nirgends steht. " * 9)
    config_ = resolve(compose(overrides(files, f"+data.validation.more={tmp_path / 'more.txt'}")), Machine(devices=("cpu",)))
    data = prepare(config_.data)
    model = new_model(config_.model, data.vocabulary, 0)
    found = validation.measure(model, data, config_)
    sums = {n: validation.held_out_sums(model, data, n, config_) for n in ("a", "b", "c", "more")}
    for name, part in sums.items():
        assert found[f"val/{name}/loss"] == part.nats / part.tokens
        stream = data.stream(name)
        assert part.tokens == len(stream) - 1
        text = data.tokenizer.decode(stream.window(1, len(stream) - 1).tolist())
        assert part.bytes == len(text.encode())
        assert found[f"val/{name}/bits_per_byte"] == pytest.approx(part.nats / math.log(2) / part.bytes)
    three = [sums[n] for n in "abc"]
    assert found["val/loss"] == pytest.approx(sum(s.nats for s in three) / sum(s.tokens for s in three))
    assert found["val/bits_per_byte"] == pytest.approx(sum(s.nats for s in three) / math.log(2) / sum(s.bytes for s in three))
    assert "val/val/loss" not in found
    assert len(data.stream("val")) == sum(len(data.stream(n)) for n in "abc")
    assert ids_of(data, "val") == [i for n in "abc" for i in ids_of(data, n)]


def test_shares_and_epochs_stand_in_the_metrics(files: dict[str, Path]) -> None:
    done = train(compose(overrides(files, "+data.corpus.weights.a=2")))
    lines = [json.loads(line) for line in done.run.metrics_file.read_text().splitlines()]
    shown = [line for line in lines if "data/share/a" in line]
    assert [line["step"] for line in shown] == [5, 10, 15, 20, 25, 30]
    data = prepare(config(files, weights={"a": 2}))
    rows = training_rows(data, 16, "concatenate", 0)
    for line in shown:
        place = rows.place(np.arange(line["step"] * 4))
        assert isinstance(rows, Mixed)
        for number, name in enumerate(rows.names):
            count = int((place[:, 0] == number).sum())
            assert line[f"data/share/{name}"] == count / len(place)
            assert line[f"data/epochs/{name}"] == pytest.approx(count / rows.parts[number].epoch_rows)
        assert sum(line[f"data/share/{n}"] for n in "abc") == pytest.approx(1)
    assert abs(shown[-1]["data/share/a"] - 0.5) < 0.15


def test_a_mix_of_one_source_trains_as_that_source_is_measured(files: dict[str, Path]) -> None:
    mixed = prepare(config({"a": files["a"]}))
    assert ids_of(mixed, "val") == ids_of(mixed, "a")
    assert mixed.weights == {"a": 1.0}


# The tokeniser of a mix


def test_a_bpe_sees_equally_many_characters_of_each_source(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for weights in ({}, {"a": 100.0}):
        made_of = config(files, "bpe", weights, characters=6000)
        corpus: Any = Mix(sources=made_of.corpus.sources, weights=weights)  # type: ignore[attr-defined]
        given: Counter[str] = Counter()
        held_out = {n: prepare(config({n: f})).stream("val") for n, f in files.items()}
        texts: dict[str, str] = {}
        for name, text in told_by_source(made_of, corpus, 6000):
            given[name] += len(text)
            texts[name] = texts.get(name, "") + text
        assert dict(given) == {"a": 2000, "b": 2000, "c": 2000}
        for name, stream in held_out.items():
            end = bytes(stream.window(max(0, len(stream) - 60), min(60, len(stream))).tolist()).decode()
            assert end not in texts[name], "what is held out is not learned from"


def told_by_source(made_of: DataConfig, corpus: Mix, characters: int) -> list[tuple[str, str]]:
    """What reaches the tokeniser's `fit`, with the source it came from."""
    found: list[tuple[str, str]] = []
    now = [""]

    def report(source: str, done: int, total: int | None) -> None:
        now[0] = source

    texts = sample(made_of, corpus.sources, characters, report)
    while True:
        text = next(texts, None)
        if text is None:
            return found
        found.append((_source(text, corpus), text))


def _source(text: str, corpus: Mix) -> str:
    (name,) = {n for n, c in corpus.sources.items() if text in "".join(p.text for p in c.pieces())}  # type: ignore[union-attr]
    return name


def test_what_fit_gets_is_the_sample(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, empty_home: Path) -> None:
    bpe: Any = component("data/tokenizer", "bpe").factory
    seen: list[str] = []
    plain = bpe.fit

    def fit(self: Any, texts: Any) -> None:
        seen.extend(texts)
        plain(self, seen)

    monkeypatch.setattr(bpe, "fit", fit)
    made_of = config(files, "bpe", characters=9000)
    made = prepare(made_of)
    assert sum(map(len, seen)) == 9000
    corpus: Any = Mix(sources=made_of.corpus.sources)  # type: ignore[attr-defined]
    assert tokenizer_file(made_of, corpus.sources).is_file()
    seen.clear()
    assert prepare(made_of).hash == made.hash
    assert seen == [], "it is learned once"


def test_a_shorter_source_is_read_again_for_its_share(tmp_path: Path) -> None:
    for name, size in (("long", 5000), ("short", 100)):
        (tmp_path / f"{name}.txt").write_text("".join(random.Random(name).choices("abcdef ", k=size)))
    text: Any = component("data/corpus", "text").factory
    sources = {n: text(path=str(tmp_path / f"{n}.txt")) for n in ("long", "short")}
    made_of = config({})
    taken = list(sample(made_of, sources, 10**6, lambda *_: None))
    assert sum(map(len, taken)) == 2 * 4500, "as much of each as the longest has to train on"


def test_characters_of_every_source_and_set_are_known(files: dict[str, Path], tmp_path: Path, empty_home: Path) -> None:
    prepare(config(files, "char"))
    (tmp_path / "more.txt").write_text("Zwölf große Boxkämpfer, noch nie gesehen. " * 5)
    made = prepare(config(files, "char", validation={"more": str(tmp_path / "more.txt")}))
    assert made.tokenizer.decode(ids_of(made, "more")) == (tmp_path / "more.txt").read_text()


# What is refused


def test_what_makes_no_sense_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.corpus\.weights\.aa: there is no such source.*; there are a, b, c"):
        prepare(config(files, weights={"aa": 1}))
    for weight in (-1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match=rf"data\.corpus\.weights\.a={weight:g} must be at least 0 and finite"):
            prepare(config(files, weights={"a": weight}))
    with pytest.raises(ConfigError, match=r"data\.corpus\.weights: one at least must be above 0"):
        prepare(config(files, weights={"a": 0.0, "b": 0.0, "c": 0.0}))
    for name in ("train", "val", "x/y"):
        with pytest.raises(ConfigError, match=f"sources.{name}: choose another name"):
            prepare(config({name: files["a"]}))
    with pytest.raises(ConfigError, match=r"data\.corpus\.sources is empty"):
        prepare(config({}))
    with pytest.raises(ConfigError, match=r"data\.validation\.a: a source of the mix has this name"):
        prepare(config(files, validation={"a": str(files["a"])}))
    nested = config(files)
    nested.corpus.sources["b"] = config({"z": files["b"]}).corpus  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"data\.corpus\.sources\.b=mix cannot be a part of a mix; only text can"):
        prepare(nested)
    nested.corpus.sources["b"] = component("data/corpus", "copy").options()  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"data\.corpus\.sources\.b=copy cannot be a part of a mix"):
        prepare(nested)
    with pytest.raises(ConfigError, match="there is no such file"):
        prepare(config({"a": tmp_path / "nowhere.txt"}))


def test_a_validation_set_that_a_source_trains_on_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "leak.txt").write_text(files["c"].read_text()[500:2500])
    for _ in range(2):
        with pytest.raises(DataError, match=r"data\.validation\.leak: \d+% of it stands in the training text too"):
            prepare(config(files, validation={"leak": str(tmp_path / "leak.txt")}))


def test_an_altered_source_is_told_by_file(files: dict[str, Path], empty_home: Path) -> None:
    made: Prepared = prepare(config(files))
    shard = made.parts["b"].folder / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"has [0-9,]+ bytes, its manifest says") as error:
        training_rows(prepare(config(files)), 16, "concatenate", 0)
    assert str(shard) in str(error.value)
