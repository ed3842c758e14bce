"""Benchmarks of EleutherAI's lm-evaluation-harness, with our engine as its model: a context is read once for all its continuations."""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptlab.config.errors import ConfigError, DataError, IOFailure
from gptlab.data.hub import network_errors
from gptlab.data.tokenizer import Tokenizer
from gptlab.evaluate.results import Score
from gptlab.generate.sampling import Sampling
from gptlab.generate.text import complete, prompt_ids
from gptlab.model.transformer import Transformer

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM
else:
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError:  # `benchmarks` says what is missing
        TemplateLM = object

ANSWER_TOKENS = 256  # of a generated answer, where the task does not say
TOGETHER = 16  # answers that are generated side by side


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """What the harness asks of a model, answered by ours."""

    backend = "causal"

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model, self.own_tokenizer = model.eval(), tokenizer
        self.max_length = model.config.context_length
        self.read = 0  # tokens that went through the model

    @property
    def eot_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        for token in (getattr(self.own_tokenizer, "begin_of_text", None), self.own_tokenizer.end_of_text):
            if token is not None:
                return int(token)
        return int(self.own_tokenizer.encode("\n")[0])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, behind the token that begins texts unless that is not asked for."""
        if add_special_tokens is False:
            return [int(token) for token in self.own_tokenizer.encode(string)]
        return prompt_ids(self.own_tokenizer, string)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **more: Any) -> list[tuple[float, bool]]:
        """(log-probability, whether it is the likeliest) of each continuation after its context; of what is too long the end is seen."""
        groups: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            whole = [*context, *continuation][-(self.max_length + 1) :]
            cut = max(1, len(whole) - len(continuation))
            groups.setdefault(tuple(whole[:cut]), []).append((i, whole[cut:]))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for before, those in groups.items():
            for (i, _), answer in zip(those, self._after(before, [tokens for _, tokens in those]), strict=True):
                found[i] = answer
        return found

    @torch.inference_mode()
    def _after(self, context: Sequence[int], continuations: Sequence[list[int]]) -> Iterator[tuple[float, bool]]:
        """Of each continuation of one context, which is read once."""
        device = self.model.embedding.weight.device
        cache = self.model.new_cache(1, self.max_length)
        first = self.model(torch.tensor([list(context)], device=device), cache=cache, reduce=_of_last)
        longest = max(len(tokens) for tokens in continuations)
        spreads = first.float().log_softmax(-1).expand(len(continuations), 1, -1)
        if longest > 1:
            cache.select([0] * len(continuations))
            fed = torch.tensor([[*tokens[:-1], *[0] * (longest - len(tokens))] for tokens in continuations], device=device)
            spreads = torch.cat((spreads, self.model(fed, cache=cache).float().log_softmax(-1)), 1)
        self.read += len(context) + len(continuations) * (longest - 1)
        for row, tokens in zip(spreads, continuations, strict=True):
            own = row[: len(tokens)]
            wanted = torch.tensor(tokens, device=device)
            likely = own.gather(-1, wanted[:, None]).double().sum()
            yield float(likely), bool((own.argmax(-1) == wanted).all())

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows that do not overlap."""
        utils = importlib.import_module("lm_eval.utils")
        found = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
            found.append(sum(likely for likely, _ in self._loglikelihood_tokens(pairs)))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each prompt, up to what the task says ends it."""
        found = [""] * len(requests)
        groups: dict[Sampling, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(_settings(request.args[1]), []).append(i)
        for settings, numbers in groups.items():
            for start in range(0, len(numbers), TOGETHER):
                part = numbers[start : start + TOGETHER]
                for one in complete(self.model, self.own_tokenizer, [requests[i].args[0] for i in part], settings):
                    found[part[one.prompt]] = one.text
        return found


def _of_last(features: Tensor, model: Transformer) -> Tensor:
    return model.logits(features[:, -1:])


def _settings(asked: dict[str, Any]) -> Sampling:
    until = asked.get("until") or []
    stop = tuple([until] if isinstance(until, str) else until)
    sampled = bool(asked.get("do_sample", False))
    temperature = float(asked.get("temperature", 1.0)) if sampled else 0.0
    return Sampling(max_tokens=int(asked.get("max_gen_toks", ANSWER_TOKENS)), temperature=temperature, top_k=0, stop=stop)


def benchmarks(
    model: Transformer, tokenizer: Tokenizer, tasks: Sequence[str], *, folder: Path | None = None, shots: int | None = None, limit: int = 0
) -> list[Score]:
    """The figures of a model on tasks of the harness, by name; `folder` holds further ones (YAML, with data of their own).

    `shots`: examples shown before each (None: as the task has it); `limit`: examples of each task at most (0: all). Raises ConfigError
    without the library, for an unknown task or a field that its data lack, IOFailure where its data cannot be fetched.
    """
    if TemplateLM is object:
        raise ConfigError("--tasks needs lm-evaluation-harness: pip install 'gptlab[eval]'")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    evaluator, manager = importlib.import_module("lm_eval.evaluator"), importlib.import_module("lm_eval.tasks")
    own = None if folder is None else str(folder)
    known = manager.TaskManager(include_path=own, include_defaults=False) if own else None
    if known is None or not set(tasks) <= set(known.all_tasks):  # to read what the harness brings takes many seconds
        known = manager.TaskManager(include_path=own)
    for task in tasks:
        if task not in known.all_tasks:
            near = difflib.get_close_matches(task, known.all_tasks, n=3)
            raise ConfigError(f"--tasks {task} is no task of the harness" + (f"; near it are {', '.join(near)}" if near else ""))
    unreachable: tuple[type[BaseException], ...] = (OSError, *network_errors())
    try:
        made = evaluator.simple_evaluate(
            model=HarnessModel(model, tokenizer), tasks=list(tasks), task_manager=known, num_fewshot=shots, limit=limit or None,
            log_samples=False, bootstrap_iters=1000,
        )  # fmt: skip
    except unreachable as error:
        raise IOFailure(
            f"--tasks {','.join(tasks)}: the data could not be had ({' '.join(str(error).split())[:150]}); "
            "a task over files of your own (dataset_path: json, dataset_kwargs: {data_files: …}), in --task-folder, needs no network"
        ) from error
    except (KeyError, importlib.import_module("jinja2").UndefinedError) as error:
        raise DataError(f"--tasks {','.join(tasks)}: the data lack a field that the task asks for ({error})") from error
    return [score for task in made["results"] for score in _scores(made, task)]


def _scores(made: dict[str, Any], task: str) -> Iterator[Score]:
    values = made["results"][task]
    examples = int(made.get("n-samples", {}).get(task, {}).get("effective", 0))
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        known = isinstance(error, (int, float))
        yield Score(task, metric, float(value), float(error) if known else None, examples, int(made.get("n-shot", {}).get(task) or 0))
