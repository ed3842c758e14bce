"""Chats as rows: whole, hardly any padding, only the assistant's tokens scored, nothing lost without a word."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptlab import compose
from gptlab.config.errors import ConfigError, DataError
from gptlab.data.chat import Message, render
from gptlab.data.conversations import Conversations, pack_whole
from gptlab.data.loader import Loader, held_out_batches, held_out_chats
from gptlab.data.prepare import find_prepared, prepare
from gptlab.data.sources import training_rows
from tests.conftest import WORDS
from tests.stand_ins.hub_server import Server

CONTEXT = 256


def chats(count: int, *, turns: int = 2, seed: int = 0, longest: int = 9) -> list[dict[str, Any]]:
    draw = random.Random(seed)

    def said() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))

    return [{"messages": [{"role": role, "content": said()} for _ in range(turns) for role in ("user", "assistant")]} for _ in range(count)]


def written(folder: Path, rows: list[dict[str, Any]], name: str = "chats.jsonl") -> Path:
    file = folder / name
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


def config(file: Path, *more: str, corpus: str = "chat") -> Any:
    return compose([f"data/corpus={corpus}", "data/tokenizer=chat", f"data.corpus.path={file}", *more]).data


def test_units_are_packed_whole_and_once() -> None:
    lengths = np.random.default_rng(0).integers(0, 101, 500)
    rows = pack_whole(lengths, 100)
    assert sorted(unit for row in rows for unit in row) == np.flatnonzero(lengths).tolist()
    assert max(int(lengths[row].sum()) for row in rows) <= 100
    assert len(rows) <= np.ceil(lengths.sum() / 100) * 11 / 9 + 1


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("many"), chats(400))


def test_a_row_holds_whole_chats_and_scores_what_the_assistant_wrote(many: Path) -> None:
    data = prepare(config(many))
    rows = Conversations(data, "train", CONTEXT, 0, "cut")
    assert Conversations(data, "train", 4 * CONTEXT, 0, "cut").padding < 0.02, "rows of many chats waste less than a fiftieth"
    assert not rows.fitted.dropped
    seen: dict[str, int] = {}
    for number in range(rows.epoch_rows):
        fetched = rows.fetch(np.array([number]), True)
        assert fetched.document is not None
        assert fetched.scored is not None
        tokens, document = fetched.tokens[0], fetched.document[0]
        for count in range(len(rows.rows[number])):
            here = np.flatnonzero(document == count)
            text = tokens[here].tolist()
            if here[-1] == CONTEXT - 1 and int(rows.fitted.lengths[rows.rows[number]].sum()) > CONTEXT:
                text.append(int(tokens[-1]))  # which is a target alone
            talk = data.tokenizer.decode(text)
            own = data.tokenizer.decode(tokens[1:][here][fetched.scored[0][here]].tolist())
            seen[talk] = seen.get(talk, 0) + 1
            answers = [part.split("<|assistant_end|>")[0] for part in talk.split("<|assistant_start|>")[1:]]
            assert own == "".join(answer + "<|assistant_end|>" for answer in answers)
        padding = np.flatnonzero(document == rows.most)
        assert not fetched.scored[0][padding].any()
    val = Conversations(data, "val", CONTEXT, 0, "cut")
    assert sum(seen.values()) + len(val.starts) == 400
    every = [json.loads(line)["messages"] for line in many.read_text().splitlines()]
    expected = {data.tokenizer.decode(render([Message(**m) for m in chat], data.tokenizer, answer=False).tokens) for chat in every}
    assert set(seen) <= expected


def test_every_epoch_visits_every_row_once_in_an_order_of_its_own(many: Path) -> None:
    rows = Conversations(prepare(config(many)), "train", CONTEXT, 3, "cut")
    count = rows.epoch_rows
    first, second = rows.place(np.arange(count)), rows.place(np.arange(count, 2 * count))
    assert sorted(first) == sorted(second) == list(range(count))
    assert first.tolist() != second.tolist()


def test_what_is_measured_of_many_held_out_chats_is_no_longer_than_the_rest(tmp_path: Path) -> None:
    file = written(tmp_path, chats(3000, longest=40, seed=5))
    data = prepare(config(file, "data.validation_fraction=0.3"))
    whole = held_out_chats(data, "val", CONTEXT)
    some = held_out_batches(data, "val", CONTEXT, 20 * CONTEXT, 20, documents=True)
    counts = [np.diff(np.flatnonzero(np.diff(row.numpy(), prepend=-1, append=-2))) for batch in some for row in batch.document]  # type: ignore[union-attr]
    measured, mean = np.concatenate([c[:-1] for c in counts]).mean(), whole.fitted.lengths[whole.fitted.lengths > 0].mean()
    assert 0.8 < measured / mean < 1.25, "packed, the longest come first"


def test_a_question_is_on_one_side_alone_and_more_records_move_none(tmp_path: Path) -> None:
    rows = chats(300, turns=1, longest=2)
    small, large = (prepare(config(written(tmp_path, part, name))) for part, name in ((rows[:200], "a.jsonl"), (rows, "b.jsonl")))

    def questions(data: Any, split: str) -> list[str]:
        stream = data.stream(split)
        text = data.tokenizer.decode(stream.window(0, len(stream)).tolist())
        return [part.split("<|user_end|>")[0] for part in text.split("<|user_start|>")[1:]]

    assert not set(questions(large, "train")) & set(questions(large, "val"))
    assert set(questions(small, "val")) <= set(questions(large, "val"))
    assert 0.03 < len(questions(large, "val")) / 300 < 0.2


LONG = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y " * 30}] * 4  # turns of 60 bytes and some marks


def test_a_chat_too_long_is_cut_at_a_turn_dropped_or_refused(tmp_path: Path) -> None:
    only = [{"role": "user", "content": "z" * 5}, {"role": "assistant", "content": "w" * 300}]
    file = written(tmp_path, [{"messages": LONG}, {"messages": only}, *chats(30, turns=1)])
    data = prepare(config(file, "data.validation_fraction=0.05"))
    cut = Conversations(data, "train", CONTEXT, 0, "cut")
    assert (cut.fitted.cut, cut.fitted.dropped) == (1, 1)
    number = int(np.flatnonzero((cut.fitted.lengths > 0) & (cut.fitted.lengths < np.diff([*cut.starts, len(cut.stream)])))[0])
    kept = cut.stream.window(int(cut.starts[number]), int(cut.fitted.lengths[number])).tolist()
    assert data.tokenizer.decode(kept).endswith("<|assistant_end|>")
    assert data.tokenizer.decode(kept).count("<|assistant_end|>") == 3
    assert Conversations(data, "train", CONTEXT, 0, "drop").fitted.dropped == 2
    assert "1 cut at a turn's end; 1 too long, dropped" in cut.described()
    with pytest.raises(DataError, match=r"chat [12] of train has \d+ tokens, more than the 257 of a row"):
        Conversations(data, "train", CONTEXT, 0, "refuse")
    with pytest.raises(DataError, match=r"none fits model\.context_length=4 with an answer"):
        Conversations(data, "train", 4, 0, "cut")
    with pytest.raises(ConfigError, match=r"data\.too_long=keep is not one of cut, drop, refuse"):
        Conversations(data, "train", CONTEXT, 0, "keep")


def test_pairs_stay_side_by_side_and_count_once(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "good " * (i % 4 + 1), "rejected": "bad"} for i in range(60)]
    data = prepare(config(written(tmp_path, rows), corpus="preferences"))
    packed = Conversations(data, "train", 96, 0, "cut")
    weight = 0
    for number in range(packed.epoch_rows):
        found = packed.fetch(np.array([number]), True)
        assert found.document is not None
        assert found.scored is not None
        weight += int(found.scored.sum())
        for place, pair in enumerate(found.extra["pair"][0]):
            for side, word in enumerate(("good", "bad")):
                own = found.extra["answer"][0] & (found.document[0] == 2 * place + side)
                assert own.any() == (pair >= 0)
                if pair >= 0:
                    text = data.tokenizer.decode(found.tokens[0, 1:][own].tolist())
                    assert text.startswith(word)
                    assert text.endswith("<|assistant_end|>")
    assert weight == len(packed.starts) // 2 == sum(len(row) for row in packed.rows)
    batch = next(held_out_batches(data, "val", 96, 0, 4))
    assert batch.weight is not None
    assert data.tokenizer.decode(batch.targets[batch.weight > 0].tolist()).startswith("good")
    dropped = Conversations(data, "train", 30, 0, "cut")
    assert dropped.fitted.dropped > 0
    assert not dropped.fitted.cut, "an answer cut short is another answer"


def test_chats_are_found_again_and_mixed_like_texts(tmp_path: Path, empty_home: Path) -> None:
    one, two = written(tmp_path, chats(60), "one.jsonl"), written(tmp_path, chats(60, seed=1), "two.jsonl")
    assert find_prepared(config(one)) is None
    made = prepare(config(one))
    found = find_prepared(config(one))
    assert found is not None
    assert found.hash == made.hash != prepare(config(two)).hash
    mixed = compose(
        ["data/corpus=mix", "data/tokenizer=chat", "+data/corpus@data.corpus.sources.one=chat", f"data.corpus.sources.one.path={one}",
         "+data/corpus@data.corpus.sources.two=chat", f"data.corpus.sources.two.path={two}", "+data.corpus.weights.two=3"]
    ).data  # fmt: skip
    data = prepare(mixed)
    assert data.validation_names == ["val", "one", "two"]
    batch = Loader(training_rows(data, CONTEXT, "concatenate", 0), 8).batch(0)
    assert batch.weight is not None
    assert batch.document is not None
    assert 0 < batch.token_weight < batch.weight.numel()
    text = written(tmp_path, [{"text": "no chat"}], "text.jsonl")
    both = compose(
        ["data/corpus=mix", "data/tokenizer=chat", "+data/corpus@data.corpus.sources.one=chat", f"data.corpus.sources.one.path={one}",
         "+data/corpus@data.corpus.sources.two=text", f"data.corpus.sources.two.path={text}"]
    ).data  # fmt: skip
    with pytest.raises(ConfigError, match="one hold chats and two texts"):
        prepare(both)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["data/tokenizer=byte"], "the tokeniser byte has no tokens of a chat; data/tokenizer=chat adds them"),
        (["+data.validation.x=here"], "data.validation and data.filter are for text"),
        (["data.filter.exact_duplicates=true"], "data.validation and data.filter are for text"),
    ],
)
def test_what_does_not_fit_chats_is_refused(many: Path, more: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        prepare(compose(["data/corpus=chat", "data/tokenizer=chat", f"data.corpus.path={many}", *more]).data)


def test_records_without_an_answer_at_all_are_told(tmp_path: Path) -> None:
    file = written(tmp_path, [{"prompt": "x"}] * 3)
    with pytest.raises(DataError, match=r"of 3 records no chat for training \(train 0, val 0, bad 3\)"):
        prepare(config(file, "data.corpus.bad=skip"))


def test_the_hubs_chats_with_their_own_validation_split(hub: Server, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    for split, count in (("train", 40), ("test", 5)):
        rows: list[dict[str, Any]] = [{"question": f"{split} {i}?", "answer": f"so\n#### {i}"} for i in range(count)]
        written(folder / "data", [*rows, {"question": "bad", "answer": None}], f"{split}.jsonl")
    hub.publish("openai/gsm8k", folder)
    data = prepare(
        compose(
            ["data/corpus=chat_hub", "data/tokenizer=chat", "data.corpus.dataset=openai/gsm8k", "data.corpus.validation_split=test"]
        ).data
    )
    assert data.manifest["splits"]["train"]["documents"] == 40
    assert data.manifest["splits"]["val"]["documents"] == 5
    assert data.manifest["splits"]["train"]["skipped"] == {"bad": 2}


def test_of_a_tree_of_messages_the_best_answers_are_taken(hub: Server, tmp_path: Path) -> None:
    def message(name: str, parent: str | None, role: str, text: str, rank: int | None = None, lang: str = "de") -> dict[str, Any]:
        return {"message_id": name, "parent_id": parent, "role": role, "text": text, "rank": rank, "lang": lang, "deleted": False}

    tree = [
        message("a", None, "prompter", "Wie spät?"),
        message("b", "a", "assistant", "Spät.", 1),
        message("c", "a", "assistant", "Acht Uhr.", 0),
        message("d", "c", "prompter", "Danke"),
        message("e", None, "prompter", "What time?", lang="en"),
        message("f", None, "prompter", "Allein"),
    ]
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    for split in ("train", "validation"):
        written(folder / "data", tree, f"{split}.jsonl")
    hub.publish("OpenAssistant/oasst2", folder)
    data = prepare(compose(["data/corpus=oasst", "data.corpus.language=de", "data/tokenizer=chat"]).data)
    assert data.manifest["splits"]["train"]["documents"] == 1
    assert data.manifest["splits"]["train"]["skipped"] == {"no answer": 2}
    stream = data.stream("train")
    assert "Acht Uhr." in data.tokenizer.decode(stream.window(0, len(stream)).tolist())
