"""CORE: one number from the 22 tasks of DCLM (Li et al., 2024), each centred on what guessing reaches, as nanochat computes it."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptlab.config.errors import ConfigError, DataError
from gptlab.data.tokenizer import Tokenizer
from gptlab.evaluate.harness import HarnessModel
from gptlab.evaluate.results import Score, share
from gptlab.model.transformer import Transformer

BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
ANSWER = "\nAnswer: "  # between a question and its answer; a space where a task has no word for it
ORDER, SHOWN = 1337, 1234  # seeds: of a task's rows, and, the row's number added, of the examples shown before it


@dataclass(frozen=True)
class Task:
    """A task: where its rows lie, how they are asked, examples shown before each, what guessing reaches, what stands before an answer."""

    name: str
    file: str
    kind: Literal["choice", "schema", "words"]
    shots: int
    chance: float
    before: str = " "


# Tasks, files and shots: DCLM's eval/mmlu_and_lowvar.yaml, its `low_variance_datasets`. Chance: its eval_meta_data_v1.csv, on which
# nanochat's figures stand. DCLM's later file says 0.403 of commonsense_qa, and of agi_eval_lsat_ar and language identification 0.25.
TASKS = (
    Task("hellaswag_zeroshot", "hellaswag.jsonl", "choice", 0, 0.25),
    Task("jeopardy", "jeopardy_all.jsonl", "words", 10, 0.0, ANSWER),
    Task("bigbench_qa_wikidata", "bigbench_qa_wikidata.jsonl", "words", 10, 0.0),
    Task("arc_easy", "arc_easy.jsonl", "choice", 10, 0.25, ANSWER),
    Task("arc_challenge", "arc_challenge.jsonl", "choice", 10, 0.25, ANSWER),
    Task("copa", "copa.jsonl", "choice", 0, 0.5),
    Task("commonsense_qa", "commonsense_qa.jsonl", "choice", 10, 0.2),
    Task("piqa", "piqa.jsonl", "choice", 10, 0.5, ANSWER),
    Task("openbook_qa", "openbook_qa.jsonl", "choice", 0, 0.25),
    Task("lambada_openai", "lambada_openai.jsonl", "words", 0, 0.0),
    Task("hellaswag", "hellaswag.jsonl", "choice", 10, 0.25),
    Task("winograd", "winograd_wsc.jsonl", "schema", 0, 0.5),
    Task("winogrande", "winogrande.jsonl", "schema", 0, 0.5),
    Task("bigbench_dyck_languages", "bigbench_dyck_languages.jsonl", "words", 10, 0.0),
    Task("agi_eval_lsat_ar", "agi_eval_lsat_ar.jsonl", "choice", 3, 0.2),
    Task("bigbench_cs_algorithms", "bigbench_cs_algorithms.jsonl", "words", 10, 0.0),
    Task("bigbench_operators", "bigbench_operators.jsonl", "words", 10, 0.0),
    Task("bigbench_repeat_copy_logic", "bigbench_repeat_copy_logic.jsonl", "words", 10, 0.0),
    Task("squad", "squad.jsonl", "words", 10, 0.0),
    Task("coqa", "coqa.jsonl", "words", 0, 0.0),
    Task("boolq", "boolq.jsonl", "choice", 10, 0.62, ANSWER),
    Task("bigbench_language_identification", "bigbench_language_identification.jsonl", "choice", 10, 0.091),
)
FIELDS = {
    "choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "words": ("context", "continuation"),
}


def centred(scores: Sequence[Score]) -> Score:
    """The number: the mean over all tasks of (accuracy - chance) / (1 - chance). Its standard error is that of independent tasks."""
    known = {score.task.removeprefix("core/"): score for score in scores}
    values = [(known[task.name].value - task.chance) / (1 - task.chance) for task in TASKS]
    errors = [(known[task.name].error or 0.0) / (1 - task.chance) for task in TASKS]
    return Score(
        "core", "centred", sum(values) / len(TASKS), math.hypot(*errors) / len(TASKS), sum(known[t.name].examples for t in TASKS), 0, 0.0
    )


def core(model: Transformer, tokenizer: Tokenizer, folder: Path | None, *, limit: int = 0) -> list[Score]:
    """CORE, and the accuracy of each of its tasks. `limit`: examples of each at most (0: all).

    The answer with the highest mean log-probability a token is the model's choice; words are right when each of their tokens is the
    likeliest. Raises ConfigError where the folder lacks a task's file, DataError where a row lacks a field.
    """
    rows = _rows(folder)
    asked = HarnessModel(model, tokenizer)
    scores = []
    for task in TASKS:
        own = rows[task.name]
        marks = [float(_right(task, own, i, asked)) for i in range(min(len(own), limit or len(own)))]
        scores.append(share(f"core/{task.name}", marks, shots=task.shots, chance=task.chance))
    return [centred(scores), *scores]


def _rows(folder: Path | None) -> dict[str, list[dict[str, Any]]]:
    """Every task's rows, in an order that is the same each time; those of a file lie by kind or by language in it."""
    place = f"the unpacked {BUNDLE}, whose eval_data holds them as JSON lines"
    if folder is None:
        raise ConfigError(f"--tasks core needs --task-folder FOLDER with the data of its 22 tasks: {place}")
    files = {task.file: next(iter(sorted(folder.rglob(task.file))), None) for task in TASKS}
    missing = [name for name, file in files.items() if file is None]
    if missing:
        some = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise ConfigError(f"--tasks core: there is no {some} in --task-folder {folder}, which would serve: {place}")
    found = {task.name: _read(task, file) for task in TASKS if (file := files[task.file]) is not None}
    for own in found.values():
        random.Random(ORDER).shuffle(own)
    return found


def _read(task: Task, file: Path) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}, line {number}: this is no JSON ({error})") from error
        if lacking := [name for name in FIELDS[task.kind] if name not in row]:
            raise DataError(f"{file}, line {number}: core/{task.name} asks for the field {lacking[0]!r}; there are {', '.join(row)}")
        found.append(row)
    if len(found) <= task.shots:
        raise DataError(f"{file} has {len(found)} rows; core/{task.name} shows {task.shots} before each")
    return found


def _right(task: Task, rows: Sequence[dict[str, Any]], number: int, asked: HarnessModel) -> bool:
    row, others = rows[number], [i for i in range(len(rows)) if i != number]
    shown = random.Random(SHOWN + number).sample(others, task.shots)
    before = "".join(f"{_question(task, rows[i])}{task.before}{_answer(task, rows[i])}\n\n" for i in shown)
    pairs = _pairs(task, row, before, asked.own_tokenizer, asked.eot_token_id)
    answers = asked._loglikelihood_tokens([(None, *pair) for pair in pairs])
    if task.kind == "words":
        return answers[0][1]
    means = [likely / len(continuation) for (likely, _), (_, continuation) in zip(answers, pairs, strict=True)]
    return means.index(max(means)) == int(row["gold"])


def _question(task: Task, row: dict[str, Any]) -> str:
    if task.kind == "choice":
        return str(row["query"])
    return str(row["context_options"][row["gold"]] if task.kind == "schema" else row["context"].strip())


def _answer(task: Task, row: dict[str, Any]) -> str:
    return str(row["choices"][row["gold"]] if task.kind == "choice" else row["continuation"])


def _pairs(task: Task, row: dict[str, Any], before: str, tokenizer: Tokenizer, begin: int) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) of each possible answer, as tokens: what they have in common at the beginning is the context, of a schema
    what they have in common at the end the continuation."""
    if task.kind == "choice":
        texts = [f"{before}{row['query']}{task.before}{choice}" for choice in row["choices"]]
    elif task.kind == "schema":
        texts = [f"{before}{option}{task.before}{row['continuation']}" for option in row["context_options"]]
    else:
        without = f"{before}{row['context'].strip()}{task.before}"
        texts = [f"{without}{row['continuation']}", without.strip()]
    whole = [[begin, *(int(token) for token in tokenizer.encode(text))] for text in texts]
    if task.kind == "schema":
        common = min(_common([ids[::-1] for ids in whole]), min(map(len, whole)) - 1)
        return [(ids[:-common], ids[-common:]) for ids in whole]
    common = _common(whole)
    if task.kind == "words":
        common = min(common, len(whole[0]) - 1)
        return [(whole[0][:common], whole[0][common:])]
    common = min(common, min(map(len, whole)) - 1)
    return [(ids[:common], ids[common:]) for ids in whole]


def _common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    return next((i for i, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1), min(map(len, rows)))
