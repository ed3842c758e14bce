"""`gptlab sample`: prompts from the option, a file or standard input; several texts; JSON lines; probabilities."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from gptlab import compose, train
from gptlab.generate.sampling import Sampling
from gptlab.generate.text import complete
from gptlab.runner.load import load
from tests.cli.conftest import Command
from tests.tiny import tiny


@pytest.fixture
def run(corpus_file: Path) -> str:
    found = train(compose(tiny(corpus_file, "study=s", steps=3))).run
    assert found is not None
    return found.identity


def test_one_text_is_the_prompt_and_what_follows(run: str, gptlab: Command) -> None:
    told = gptlab("sample", run, "--prompt", "the ", "--max-tokens", "9", "--seed", "3")
    assert told.code == 0
    assert told.out == "the " + load(run).sample("the ", max_tokens=9, seed=3) + "\n"


def test_json_lines_hold_every_text_with_its_tokens(run: str, gptlab: Command, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("the \n\nand ")
    told = gptlab("sample", run, "--prompt-file", str(file), "--lines", "--samples", "2", "--max-tokens", "5", "--json")
    lines = [json.loads(line) for line in told.out.splitlines()]
    expected = [("the ", 0, 0), ("the ", 1, 1), ("and ", 0, 0), ("and ", 1, 1)]
    assert [(line["prompt"], line["sample"], line["seed"]) for line in lines] == expected
    loaded = load(run)
    alone = complete(loaded.model, loaded.tokenizer, ["the ", "and "], Sampling(5, 0.8, 50), samples=2)
    assert [line["text"] for line in lines] == [one.text for one in alone]
    assert all(loaded.tokenizer.decode(line["tokens"]) == line["text"] and line["finish"] == "length" for line in lines)
    assert all(len(line["logprobs"]) == 5 and max(line["logprobs"]) <= 0 for line in lines)


def test_standard_input_is_a_prompt_as_a_whole(run: str, gptlab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the \nand\n"))
    told = gptlab("sample", run, "--prompt-file", "-", "--max-tokens", "4")
    assert told.out.startswith("the \nand")
    assert len(told.out) == len("the \nand") + 4 + 1


def test_several_texts_have_heads_and_probabilities_a_line_a_token(run: str, gptlab: Command) -> None:
    told = gptlab("sample", run, "--samples", "2", "--max-tokens", "3").out
    assert [line for line in told.splitlines() if line.startswith("──")] == ["── sample 1 of 2, seed 0", "── sample 2 of 2, seed 1"]
    shown = gptlab("sample", run, "--prompt", "the ", "--max-tokens", "3", "--show-probabilities").out.splitlines()
    assert all(0 <= float(line.split()[0]) <= 1 and json.loads(line.split(maxsplit=1)[1]) for line in shown[:3])
    assert "the probability of each token" in shown[3]


def test_a_search_gives_its_best_texts_with_their_log_probabilities(run: str, gptlab: Command) -> None:
    one = gptlab("sample", run, "--prompt", "the ", "--max-tokens", "6", "--beams", "3").out
    told = gptlab("sample", run, "--prompt", "the ", "--max-tokens", "6", "--beams", "3", "--samples", "2").out
    assert one.startswith("the ")
    assert len([line for line in told.splitlines() if line.startswith("── log-probability -")]) == 2
    assert one in told


def test_a_draft_and_look_up_leave_the_greedy_text_as_it_is(run: str, gptlab: Command, corpus_file: Path) -> None:
    other = train(compose(tiny(corpus_file, "study=s", "model.width=8", steps=3))).run
    assert other is not None
    greedy = ["sample", run, "--prompt", "the ", "--max-tokens", "30", "--temperature", "0"]
    plain = gptlab(*greedy).out
    assert gptlab(*greedy, "--draft", other.identity).out == plain
    assert gptlab(*greedy, "--lookup").out == plain
    byte = train(compose(tiny(corpus_file, "study=s", "data/tokenizer=byte", steps=1))).run
    assert byte is not None
    refused = gptlab(*greedy, "--draft", byte.identity)
    assert (refused.code, refused.out) == (2, "")
    assert "another tokeniser" in refused.err


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--prompt", ""], 2, "the prompt is empty"),
        (["--prompt", "the ", "--prompt-file", "x"], 2, "--prompt and --prompt-file: one of them"),
        (["--prompt-file", "nowhere.txt"], 3, "--prompt-file nowhere.txt cannot be read"),
        (["--lines"], 2, "--lines is of a --prompt-file"),
        (["--prompt", "the ☃"], 2, "☃"),
        (["--samples", "0"], 2, "--samples 0 must be at least 1"),
        (["--top-p", "nan"], 2, "--top-p nan must be above 0 and at most 1"),
        (["--stop", ""], 2, "--stop"),
        (["--json", "--show-probabilities"], 2, "one form at a time"),
        (["--beams", "-1"], 2, "--beams -1 must be at least 1"),
        (["--beams", "2", "--lookup"], 2, "--beams goes with --prompt"),
        (["--beams", "2", "--samples", "3", "--max-tokens", "4"], 2, "--samples 3: a search with --beams 2"),
        (["--beams", "2"], 2, "do not fit the context of 16"),
        (["--lookup", "--json"], 2, "know no log-probabilities"),
        (["--lookup", "--draft", "latest"], 2, "--draft and --lookup: one of them"),
        (["--draft", "nothing"], 2, "nothing"),
        (["--precision", "fp64"], 2, "--precision fp64 is not one of"),
        (["--device", "tpu"], 2, "--device tpu: this machine has"),
    ],
)
def test_what_means_nothing_is_refused_in_a_sentence(run: str, gptlab: Command, arguments: list[str], code: int, told: str) -> None:
    found = gptlab("sample", run, *arguments)
    assert (found.code, found.out) == (code, "")
    assert told in " ".join(found.err.split())
