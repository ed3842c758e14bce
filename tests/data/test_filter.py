"""Filter: later duplicates go and nothing else does, held-out text is found, and a resumed pass judges as an uninterrupted one."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from gptlab.config.errors import ConfigError, DataError, IOFailure
from gptlab.data import filter as module
from gptlab.data import words
from gptlab.data.filter import DEPTH, Filter, FilterConfig, Look, bands
from gptlab.data.words import VALUES

BOTH = FilterConfig(exact_duplicates=True, near_duplicates=0.8)
SharedText = Callable[[str], Path]


def words_of(text: str) -> list[str]:
    """The words of a text in scripts with spaces, the plain way."""
    return re.findall(r"[^\W_]+", text.lower().replace("'", "").replace("’", ""))


def hashes(text: str) -> list[int]:
    found, begins = words.hash_words([text])
    assert begins.tolist() == [0, len(found)]
    return [int(w) for w in found]


def jaccard(one: str, other: str) -> float:
    a, b = ({tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (words_of(one), words_of(other)))
    return len(a & b) / max(1, len(a | b))


def made_up(draw: random.Random, count: int) -> str:
    return " ".join(f"w{draw.getrandbits(48):x}" for _ in range(count))


def pair(draw: random.Random, similarity: float) -> tuple[str, str]:
    """Two documents whose Jaccard similarity is exactly this: 400 shingles together."""
    common = round(400 * similarity)
    own = (400 - common) // 2
    shared = made_up(draw, common + 4)
    one, other = f"{shared} {made_up(draw, own)}", f"{shared} {made_up(draw, own)}"
    assert jaccard(one, other) == similarity
    return one, other


def judge(keep: Filter, texts: list[str]) -> list[str]:
    return [keep.reason(keep.look(text)) for text in texts]


def test_an_exact_duplicate_goes_and_its_original_stays() -> None:
    texts = ["One  text.\n", "Another text.", " One text.", "one text.", "Another\ttext.", "One text"]
    assert judge(Filter(FilterConfig(exact_duplicates=True), []), texts) == ["", "", "exact_duplicate", "", "exact_duplicate", ""]
    assert judge(Filter(FilterConfig(), []), texts) == [""] * 6, "nothing goes that was not asked for"


@pytest.mark.parametrize("threshold", [0.5, 0.8])
@pytest.mark.parametrize("similarity", [0.95, 0.8, 0.5, 0.2])
def test_near_duplicates_go_as_often_as_their_similarity_says(similarity: float, threshold: float) -> None:
    draw, pairs = random.Random(f"{similarity} {threshold}"), 250
    keep = Filter(FilterConfig(near_duplicates=threshold), [])
    removed, agreed = 0, []
    for _ in range(pairs):
        one, other = (keep.look(text) for text in pair(draw, similarity))
        assert keep.reason(one) == "", "the first of a pair stays"
        removed += keep.reason(other) == "near_duplicate"
        agreed.append(np.mean(one.signature == other.signature))
    # An estimate is a binomial count of 128: of the pairs at the threshold itself, about half go.
    weights = [math.comb(VALUES, k) * similarity**k * (1 - similarity) ** (VALUES - k) for k in range(VALUES + 1)]
    expected = sum(weights[math.ceil(VALUES * threshold) :])
    spread = math.sqrt(expected * (1 - expected) / pairs)
    assert expected - 4 * spread - 0.01 <= removed / pairs <= expected + 4 * spread + 1e-9
    error = math.sqrt(similarity * (1 - similarity) / VALUES)
    assert abs(np.mean(agreed) - similarity) < 4 * error / math.sqrt(pairs), "the estimate has no bias"
    assert 0.8 * error < np.std(agreed) < 1.25 * error, "the 128 values are as good as independent"


@pytest.mark.parametrize("threshold", [0.04, 0.1, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0])
def test_bands_find_a_pair_at_the_threshold(threshold: float) -> None:
    count, rows = bands(threshold)
    assert count * rows <= VALUES
    assert 1 - (1 - threshold**rows) ** count >= 0.99
    draw, pairs = random.Random(threshold), 4000
    equal = np.array([[draw.random() < threshold for _ in range(VALUES)] for _ in range(pairs)])
    signatures = np.array([[draw.getrandbits(16) for _ in range(VALUES)] for _ in range(pairs)], np.uint16)
    others = np.where(equal, signatures, signatures ^ np.uint16(1))
    met = (module._keys(signatures, count, rows) == module._keys(others, count, rows)).any(axis=1)
    assert met.mean() > 0.983, "0.99, less four standard deviations"


@pytest.mark.parametrize("similarity", [-0.1, 0.03, 1.01, float("nan")])
def test_a_similarity_that_cannot_be_sought_is_refused(similarity: float) -> None:
    with pytest.raises(ConfigError, match=rf"data\.filter\.near_duplicates={similarity}: give a similarity from 0\.04 to 1"):
        Filter(FilterConfig(near_duplicates=similarity), [])


def test_short_documents_are_near_duplicates_only_as_a_whole() -> None:
    texts = ["Yes, sir.", "yes sir", "Yes, sir, no", "...", "!!!", "", "sir yes"]
    assert judge(Filter(FilterConfig(near_duplicates=0.8), []), texts) == ["", "near_duplicate", *[""] * 5]


def test_of_a_crowded_bucket_the_newest_are_compared() -> None:
    keep = Filter(FilterConfig(near_duplicates=0.8), [])
    keys = np.zeros(bands(0.8)[0], np.uint32)
    looks = [Look(0, np.full(VALUES, i + 1, np.uint16), keys, "") for i in range(DEPTH + 6)]
    assert [keep.reason(look) for look in looks] == [""] * len(looks)
    assert keep.reason(looks[6]) == "near_duplicate", "64 back"
    assert keep.reason(looks[-1]) == "near_duplicate"
    assert keep.reason(looks[5]) == "", "65 back: not compared, and so kept"


RUN_OF_13 = "It was a bright cold day in April, and the clocks struck thirteen"


def test_a_planted_run_of_13_words_is_found_and_one_of_12_is_not() -> None:
    held = f"{made_up(random.Random(0), 40)} {RUN_OF_13} {made_up(random.Random(1), 40)}"
    assert len(words_of(RUN_OF_13)) == 13
    keep = Filter(FilterConfig(), [("val", ["no run of this one is found in anything that follows here below", held])])
    draw = random.Random(2)
    before, after = made_up(draw, 5000), made_up(draw, 20000)
    shorter = RUN_OF_13.rsplit(" ", 1)[0]
    for planted in (RUN_OF_13, RUN_OF_13.upper().replace(" ", "\n- "), RUN_OF_13.replace("cold", "“cold”").replace(",", " —")):
        assert keep.reason(keep.look(f"{before} {planted} {after}")) == "overlap:val", planted
        assert keep.reason(keep.look(planted)) == "overlap:val"
    halves = RUN_OF_13.split(", ")
    assert [keep.reason(look) for look in keep.looks([RUN_OF_13, *halves])] == ["overlap:val", "", ""], "not across two documents"
    for kept in (shorter, RUN_OF_13.replace("cold", "warm"), RUN_OF_13.replace("cold day", "day cold")):
        assert keep.reason(keep.look(f"{before} {kept} {after}")) == "", kept
        assert keep.reason(keep.look(kept)) == ""


def test_a_short_held_out_text_is_sought_whole() -> None:
    question = "What is the airspeed velocity of an unladen swallow?"
    keep = Filter(FilterConfig(), [("quiz", ["Yes.", question, made_up(random.Random(0), 50)])])
    assert keep.reason(keep.look(f"so he asked: {question.lower()} and nobody knew")) == "overlap:quiz"
    assert keep.reason(keep.look("What is the airspeed velocity of an unladen")) == "", "8 of its 9 words"
    with pytest.raises(DataError, match="the held-out set tiny has no text of 8 words or more"):
        Filter(FilterConfig(), [("quiz", [question]), ("tiny", ["two words", "one two three four five six seven"])])


def test_an_overlap_is_told_before_a_duplicate_with_its_first_set_and_not_remembered() -> None:
    common, own = made_up(random.Random(0), 20), made_up(random.Random(1), 20)
    keep = Filter(BOTH, [("a", [common]), ("b", [own, common])])
    assert judge(keep, [f"x {common}", f"x {common}", own, f"{own} {common}"]) == ["overlap:a", "overlap:a", "overlap:b", "overlap:a"]
    assert keep._count == 0


def test_words_are_those_of_the_plain_rule_wherever_a_text_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Don’t stop — don't STOP; naïve Ünïcode, snake_case x2 ½ été.\n" * 9
    number: dict[str, int] = {}
    expected = [number.setdefault(w, len(number)) for w in words_of(text)]
    found = hashes(text)
    numbers: dict[int, int] = {}
    assert [numbers.setdefault(h, len(numbers)) for h in found] == expected
    plain = "the Quick, brown fox's 2 tails"
    assert hashes(plain) == hashes(plain + " é")[:-1], "one hash, whatever stands beside it"
    for size in (16, 64, 100):
        monkeypatch.setattr(words, "SLICE", size)
        assert hashes(text) == found
    assert len(hashes("日本語のテキスト, ภาษา")) == 12, "a character is a word where no spaces are written"
    assert len(hashes("日本abc語 x")) == 5
    assert len(hashes("नमस्ते दुनिया")) == 2, "a mark belongs to its word"
    assert len(hashes("\ud800 x " * 200)) == 200, "what cannot be encoded is no error"
    monkeypatch.undo()
    assert len(hashes("é " * (words.SLICE // 2 - 1) + "é" + "İ" * 3 * words.SLICE)) > 0, "nor is what grows when it is lowered"


def test_hashes_are_the_same_in_every_process() -> None:
    look = Filter(BOTH, []).look("The same hashes, whatever the machine, the process and the thread: naïve.")
    assert look.exact == 7767252905698995627
    assert look.signature is not None
    assert look.signature[:6].tolist() == [38310, 52236, 51394, 58186, 57758, 10581]
    assert look.keys[:3].tolist() == [1708021723, 124120901, 1595110357]


def corpus(count: int, seed: int) -> list[str]:
    """Documents of which about a third are exact, near or no duplicates of earlier ones."""
    draw = random.Random(seed)
    texts: list[str] = []
    for _ in range(count):
        if texts and draw.random() < 0.35:
            parts = draw.choice(texts).split()
            if draw.random() < 0.6:
                parts[draw.randrange(len(parts))] = "changed"
            texts.append(" ".join(parts))
        else:
            texts.append(made_up(draw, draw.randint(1, 120)))
    return texts


@pytest.mark.parametrize("options", [BOTH, FilterConfig(exact_duplicates=True), FilterConfig(near_duplicates=0.6), FilterConfig()])
def test_a_pass_resumed_anywhere_equals_an_uninterrupted_one(tmp_path: Path, options: FilterConfig) -> None:
    texts = corpus(40, 1)
    held = [("val", [texts[7]])] if len(texts[7].split()) > 13 else [("val", [texts[20] + made_up(random.Random(0), 20)])]
    whole, file = Filter(options, held), tmp_path / "filter.bin"
    marks, expected = [], []
    for text in texts:
        marks.append(json.loads(json.dumps(whole.save(file))))
        expected.append(whole.reason(whole.look(text)))
    end = whole.save(file)
    content = file.read_bytes() if file.exists() else b""
    assert any(r.startswith("overlap") for r in expected)
    for at in range(len(texts)):
        if content:
            file.write_bytes(content + b"cut short")  # more than was recorded
        again = Filter(options, held)
        again.restore(file, marks[at])
        assert (marks[at]["judged"], again.save(file)) == (at, marks[at])
        assert judge(again, texts[at:]) == expected[at:]
        assert again.save(file) == end
        assert not content or file.read_bytes() == content


def test_a_new_pass_does_not_read_what_an_old_one_left(tmp_path: Path) -> None:
    file = tmp_path / "filter.bin"
    file.write_bytes(b"left by a preparation that was killed")
    keep = Filter(BOTH, [])
    assert keep.save(file) == {"judged": 0, "kept": 0, "row": 8 + 2 * VALUES, "crc32": 0}
    assert file.read_bytes() == b""
    judge(keep, ["a text", "A text"])
    assert keep.save(file)["kept"] == 1
    assert file.stat().st_size == 8 + 2 * VALUES, "264 bytes for a kept document"


def test_nothing_is_forgotten_when_the_index_grows(tmp_path: Path) -> None:
    draw = random.Random(3)
    texts = [made_up(draw, draw.randint(8, 20)) for _ in range(2500)]
    exact, near = Filter(FilterConfig(exact_duplicates=True), []), Filter(FilterConfig(near_duplicates=0.9), [])
    assert judge(exact, texts + texts) == [""] * 2500 + ["exact_duplicate"] * 2500
    assert judge(near, texts + texts) == [""] * 2500 + ["near_duplicate"] * 2500
    mark = near.save(tmp_path / "near")
    again = Filter(FilterConfig(near_duplicates=0.9), [])
    again.restore(tmp_path / "near", mark)
    assert judge(again, texts) == ["near_duplicate"] * 2500


def test_chains_made_at_once_are_those_made_one_by_one() -> None:
    keys = np.random.default_rng(0).integers(0, 1 << 32, (3000, 4)).astype(np.uint32)
    keys[::7] = keys[0]
    documents = np.flatnonzero(np.arange(3000) % 5)  # some are in no chain
    step, once = module._Chains(4), module._Chains(4)
    for count in (0, 1500):
        step.build(documents[documents < count], keys[documents[documents < count]], 3000)
    for document in documents[documents >= 1500].tolist():
        step.add(document, keys[document])
    once.build(documents, keys[documents], 3000)
    for key in keys[:50]:
        assert [d.tolist() for d in once.walk(key)] == [d.tolist() for d in step.walk(key)]
    first_band = [d[0] for d in once.walk(keys[0]) if len(d) == 4]
    assert first_band == sorted(first_band, reverse=True), "newest first"
    assert len(first_band) >= len(documents[documents % 7 == 0]) > 300


def test_a_file_that_does_not_match_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, keep = tmp_path / "filter.bin", Filter(BOTH, [])
    judge(keep, ["one text", "another text"])
    mark = keep.save(file)
    content = file.read_bytes()
    with pytest.raises(DataError, match=r"filter\.bin was made for other duplicates than data\.filter seeks"):
        Filter(FilterConfig(exact_duplicates=True), []).restore(file, mark)
    for damaged in (content[:-1], content[: len(content) // 2], content[:-1] + b"\0", b""):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"filter\.bin is shorter than it was written, or damaged: start the preparation again"):
            Filter(BOTH, []).restore(file, mark)
    file.write_bytes(content[:100])
    with pytest.raises(DataError, match="is shorter than it was written"):
        keep.save(file)
    file.unlink()
    with pytest.raises(DataError, match="is missing"):
        Filter(BOTH, []).restore(file, mark)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(IOFailure, match=r"filter\.bin could not be written \(No space left on device\)"):
        Filter(BOTH, []).save(file)


@pytest.fixture(scope="module")
def web(shared_text: SharedText) -> Iterator[list[str]]:
    with shared_text("c4_demo.jsonl").open(encoding="utf-8") as lines:
        yield [json.loads(line)["text"] for line in lines]


def test_of_300_web_pages_none_goes_but_what_is_planted(web: list[str]) -> None:
    keep = Filter(BOTH, [("val", web[:20])])
    assert judge(keep, web[20:]) == [""] * 280, "no two of these pages have anything in common"
    assert judge(keep, web[20:]) == ["exact_duplicate"] * 280
    long = [text for text in web[20:] if len(words_of(text)) > 300]
    planted = [text.upper().replace(". ", ".\n\n", 3) + " Read more" for text in long]
    assert min(jaccard(a, b) for a, b in zip(long, planted, strict=True)) > 0.97
    assert judge(keep, planted) == ["near_duplicate"] * len(long)
    middle = [" ".join(text.split()[20:60]) for text in web[:20]]
    mixed = [f"{a} {b}" for a, b in zip(web[100:], middle, strict=False)]
    assert set(judge(keep, mixed)) == {"overlap:val"}


def test_of_a_novelists_paragraphs_only_the_similar_go(shared_text: SharedText) -> None:
    text = shared_text("jane_austen.txt").read_text(encoding="utf-8")
    pieces = [p for p in re.split(r"\n\s*\n", text) if len(p.split()) > 80][:1500]
    draw = random.Random(0)
    similar = {draw.randrange(800): i for i in range(800, 900)}
    for source, at in similar.items():  # a word in the middle is changed: five shingles
        words = pieces[source].split()
        words[len(words) // 2] = "otherwise"
        pieces[at] = " ".join(words)
    reasons = judge(Filter(FilterConfig(near_duplicates=0.7), []), pieces)
    gone = {i for i, r in enumerate(reasons) if r}
    assert set(similar.values()) <= gone
    assert gone - set(similar.values()) == set(), "no other paragraph is like one before it"


def test_a_document_looks_the_same_in_any_company_and_thread(web: list[str]) -> None:
    texts = [*web[:60], "", "...", "Two words.", "日本", "\n".join(web[60:80]), "", *web[80:]]
    keep = Filter(BOTH, [("val", web[:20]), ("quiz", [" ".join(web[30].split()[:9])])])
    alone = [keep.look(text) for text in texts]
    assert sum(look.signature is None for look in alone) == 3
    assert {look.overlap for look in alone} == {"", "val", "quiz"}
    units = [texts[i : i + size] for size in (1, 7, len(texts)) for i in range(0, len(texts), size)]
    with ThreadPoolExecutor(4) as pool:
        together = [look for unit in pool.map(keep.looks, units) for look in unit]
    for one, other in zip(3 * alone, together, strict=True):
        assert (one.exact, one.overlap) == (other.exact, other.overlap)
        assert repr(one.signature) == repr(other.signature)
        assert np.array_equal(one.keys, other.keys)
    assert keep.looks([]) == []
