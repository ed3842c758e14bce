"""The harness's figures with our engine are those of its own model of the same weights; a task over files needs no network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

from gptlab.config.errors import ConfigError, DataError, IOFailure  # noqa: E402
from gptlab.config.registry import build, component, load_components  # noqa: E402
from gptlab.data.tokenizer import Tokenizer  # noqa: E402
from gptlab.evaluate.harness import HarnessModel, benchmarks  # noqa: E402
from gptlab.interop.gpt2 import GPT2  # noqa: E402
from gptlab.interop.shapes import imported  # noqa: E402
from gptlab.interop.tokenizers import tokenizer_json  # noqa: E402
from gptlab.model.transformer import Transformer  # noqa: E402
from gptlab.runner.run import Run  # noqa: E402
from tests.data.conftest import hub as hub  # noqa: E402 (the fixture)
from tests.stand_ins.hub_server import Server  # noqa: E402

load_components()
CONTEXT = 32
TASK = """
task: kings
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
ROWS = [
    {"question": "the king", "choices": ["reads", "sings a song", "a"], "answer": 0},
    {"question": "a great and very old queen builds a small", "choices": ["stone", "over the river"], "answer": 1},
    {"question": "day and", "choices": ["night", "light", "token", "again"], "answer": 2},
] * 4


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with one task over a file."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "kings.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    return folder


@pytest.fixture
def both(tmp_path: Path) -> tuple[Transformer, Tokenizer, Any]:
    """A random GPT-2 over bytes: ours, and the harness's own model of it."""
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(0)
    settings = {
        "vocab_size": 257,
        "n_positions": CONTEXT,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 256,
        "eos_token_id": 256,
    }
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    config = GPT2.config(theirs.config.to_dict(), "config.json")
    ours = Transformer(config, 257).eval()
    ours.load_state_dict(imported(GPT2, config, 257, theirs.state_dict(), "here"))
    tokenizer: Tokenizer = build(component("data/tokenizer", "byte").options())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokenizer)))
    words = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|endoftext|>")
    return ours, tokenizer, HFLM(pretrained=theirs, tokenizer=words, device="cpu", batch_size=1, max_length=CONTEXT)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


def test_log_likelihoods_are_those_of_the_harness_own_model(both: tuple[Transformer, Tokenizer, Any]) -> None:
    ours, tokenizer, theirs = both
    mine = HarnessModel(ours, tokenizer)
    asked = [
        ("the king", " reads"), ("the king", " sings a song"), ("the king", " a"), ("", "from nothing"), ("a space ", "moves over"),
        ("a context that is far longer than the model's thirty-two tokens", " is cut at its beginning"),
    ]  # fmt: skip
    found, expected = mine.loglikelihood(requests(*asked), disable_tqdm=True), theirs.loglikelihood(requests(*asked), disable_tqdm=True)
    for (value, greedy), (wanted, other), pair in zip(found, expected, asked, strict=True):
        assert greedy == other
        assert value == pytest.approx(wanted, abs=1e-4), pair
    long = requests(("short", " and an answer that alone is longer than all of the context of the model"))  # theirs fails at it
    assert mine.loglikelihood(long, disable_tqdm=True)[0][0] < 0
    texts = requests(("a text of some length, which takes several windows of the model to read",), ("short",))
    assert mine.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-4)
    written = requests(("the king", {"until": ["q"], "max_gen_toks": 12, "do_sample": False}), ("a", {"until": "\n", "max_gen_toks": 5}))
    assert [len(text) <= 12 for text in mine.generate_until(written)] == [True, True]


def test_a_context_is_read_once_for_all_its_answers(both: tuple[Transformer, Tokenizer, Any]) -> None:
    ours, tokenizer, _ = both
    mine = HarnessModel(ours, tokenizer)
    mine.loglikelihood(requests(*[("a context of twenty five", answer) for answer in (" one", " two", " six", " ten")]), disable_tqdm=True)
    assert mine.read == 24 + 4 * 3, "four answers of four tokens, whose first needs nothing more than the context"


@pytest.mark.slow
def test_a_task_over_a_file_is_scored_as_by_the_harness_own_model(both: tuple[Transformer, Tokenizer, Any], tasks: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    ours, tokenizer, theirs = both
    found = {score.metric: score for score in benchmarks(ours, tokenizer, ["kings"], folder=tasks)}
    expected = simple_evaluate(
        model=theirs, tasks=["kings"], task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=1000
    )
    for metric in ("acc", "acc_norm"):
        assert found[metric].value == expected["results"]["kings"][f"{metric},none"]
        assert found[metric].error == pytest.approx(expected["results"]["kings"][f"{metric}_stderr,none"])
    assert (found["acc"].examples, found["acc"].shots, len(found)) == (12, 0, 2)
    assert next(iter(benchmarks(ours, tokenizer, ["kings"], folder=tasks, limit=5))).examples == 5


@pytest.mark.slow
def test_the_command_shows_and_keeps_them(finished_run: Run, tasks: Path, gptlab: Callable[..., Any]) -> None:
    rows = [{**row, "choices": [c[:3] for c in row["choices"]]} for row in ROWS]
    (tasks.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["evaluate", finished_run.identity, "--tasks", "kings", "--task-folder", str(tasks)]
    shown = gptlab(*asked)
    assert shown.code == 0, shown.err
    assert "kings" in shown.out
    assert "± a standard error" in shown.out
    kept = finished_run.read("benchmarks.json")
    assert kept is not None
    told = json.loads(gptlab(*asked, "--json").out)
    assert kept["kings/acc"]["value"] == told[finished_run.identity if finished_run.identity in told else next(iter(told))][0]["value"]
    for more, code, said in (
        (["--tasks", "helaswag"], 2, "--tasks helaswag is no task of the harness; near it are hellaswag"),
        (["--limit", "3"], 2, "--limit goes with --tasks, --probes and --chats"),
        (["--tasks", "kings", "--tokens", "5"], 2, "--tasks and --probes go without --text and --tokens"),
    ):
        refused = gptlab("evaluate", finished_run.identity, *more)
        assert (refused.code, said in refused.err) == (code, True), refused.err


HELLASWAG = """
task: swag
dataset_path: Rowan/hellaswag
training_split: train
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{activity_label}}: {{ctx_a}} {{ctx_b.capitalize()}}"
doc_to_target: "{{label}}"
doc_to_choice: endings
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
HEADER = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: train.jsonl}
  - {split: validation, path: validation.jsonl}
---
"""


@pytest.mark.slow
def test_a_task_of_the_hub_is_fetched_and_scored(both: tuple[Transformer, Tokenizer, Any], hub: Server, tmp_path: Path) -> None:
    ours, tokenizer, _ = both
    rows = [
        {
            "activity_label": f"Number {i}",
            "ctx_a": "The king",
            "ctx_b": "he",
            "endings": ["reads", "sings", "waits", "goes"],
            "label": str(i % 4),
        }
        for i in range(8)
    ]
    folder, tasks = tmp_path / "repository", tmp_path / "swag"
    folder.mkdir()
    tasks.mkdir()
    (folder / "README.md").write_text(HEADER)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "swag.yaml").write_text(HELLASWAG)
    hub.publish("Rowan/hellaswag", folder)
    found = {score.metric: score for score in benchmarks(ours, tokenizer, ["swag"], folder=tasks, shots=2)}
    assert any(request.path.endswith("validation.jsonl") for request in hub.data_requests())
    assert (found["acc"].examples, found["acc"].shots) == (8, 2)
    plain = {score.metric: score for score in benchmarks(ours, tokenizer, ["swag"], folder=tasks)}
    mine = HarnessModel(ours, tokenizer)
    right = 0
    for row in rows:
        asked = [(f"{row['activity_label']}: The king He", f" {ending}") for ending in row["endings"]]
        likely = [value for value, _ in mine.loglikelihood(requests(*asked), disable_tqdm=True)]
        right += likely.index(max(likely)) == int(str(row["label"]))
    assert plain["acc"].value == right / 8
    hub.switch_off()
    (tasks / "swag.yaml").write_text(HELLASWAG.replace("Rowan/hellaswag", "Rowan/other"))
    with pytest.raises(IOFailure, match=r"--tasks swag: the data could not be had .*data_files.*in --task-folder, needs no network"):
        benchmarks(ours, tokenizer, ["swag"], folder=tasks)


@pytest.mark.slow
def test_what_cannot_be_asked_of_a_task_is_told(
    both: tuple[Transformer, Tokenizer, Any], tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, tokenizer, _ = both
    with pytest.raises(ConfigError, match=r"--tasks nothing_like_it is no task"):
        benchmarks(ours, tokenizer, ["nothing_like_it"])
    (tasks.parent / "rows.jsonl").write_text(json.dumps({"choices": ["a", "b"], "answer": 0}) + "\n")
    with pytest.raises(DataError, match=r"--tasks kings: the data lack a field that the task asks for \(.*question"):
        benchmarks(ours, tokenizer, ["kings"], folder=tasks)

    def unreachable(**_: Any) -> None:
        raise ConnectionError("the hub is not there")

    monkeypatch.setattr("lm_eval.evaluator.simple_evaluate", unreachable)
    with pytest.raises(
        IOFailure, match=r"--tasks kings: the data could not be had \(the hub is not there\).*--task-folder, needs no network"
    ):
        benchmarks(ours, tokenizer, ["kings"], folder=tasks)
