"""`gptlab sample`: texts from a trained run, as they are made, as JSON lines, or coloured by how likely each token was."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

from rich.text import Text

from gptlab.config.errors import ConfigError, DataError
from gptlab.data.tokenizer import digest, to_json
from gptlab.generate.beam import beam_search
from gptlab.generate.sampling import Sampling
from gptlab.generate.speculative import Draft, Lookup, Proposer
from gptlab.generate.text import Completion, TextStream, complete, prompt_ids
from gptlab.generate.weights import for_generation
from gptlab.hardware.device import machine
from gptlab.runner.load import Loaded, load
from gptlab.tracker.console import console

# From unlikely to likely; each with the least probability it is for. Readable by the colour-blind: from orange to blue through grey.
_COLOURS = ((0.5, "blue"), (0.1, "cyan"), (0.02, "bright_black"), (0.0, "dark_orange"))


def sample(
    run: str,
    *,
    prompt: str | None,
    file: Path | None,
    lines: bool,
    samples: int,
    settings: Sampling,
    as_json: bool,
    probabilities: bool,
    checkpoint: str,
    weights: str,
    device: str,
    precision: str,
    draft: str | None,
    lookup: bool,
    beams: int,
) -> None:
    """Write texts to standard output. Raises ConfigError for settings that mean nothing, DataError for a file that cannot be read."""
    settings.check()
    prompts = _prompts(prompt, file, lines)
    if as_json and probabilities:
        raise ConfigError("--json and --show-probabilities: one form at a time; JSON lines have each token's log-probability already")
    if device.split(":")[0] not in machine().devices:
        raise ConfigError(f"--device {device}: this machine has {', '.join(machine().devices)}")
    if beams and (draft or lookup or as_json or probabilities or settings.stop):
        raise ConfigError("--beams goes with --prompt, --samples (of the best texts) and --max-tokens alone")
    if (draft or lookup) and (as_json or probabilities):
        raise ConfigError("--draft and --lookup know no log-probabilities: leave --json and --show-probabilities out")
    loaded = load(run, checkpoint=checkpoint, weights=weights, device=device)
    proposer = _proposer(loaded, draft, lookup, device, precision)
    for_generation(loaded.model, precision)
    if beams:
        _best(loaded, prompts, beams, samples, settings.max_tokens)
        return
    single = len(prompts) * samples == 1 and not as_json and not probabilities

    def streamed(one: Completion, text: str) -> None:
        if single:  # the prompt, too, once it is known to be one
            print((prompts[0].lstrip("\n") if one.text == text else "") + text, end="", flush=True)

    likely = as_json or probabilities
    found = complete(
        loaded.model, loaded.tokenizer, prompts, settings, samples=samples, logprobs=likely, proposer=proposer, streamed=streamed
    )
    if single:
        print("" if found[0].text else prompts[0].lstrip("\n"))
        return
    for one in found:
        if as_json:
            told = {"prompt": prompts[one.prompt], "sample": one.sample, "seed": settings.seed + one.sample, "text": one.text}
            told |= {"finish": one.finish, "tokens": one.tokens, "logprobs": one.logprobs}
            print(json.dumps(told, ensure_ascii=False))
            continue
        if len(found) > 1:
            of = f"prompt {one.prompt + 1} of {len(prompts)}, " * (len(prompts) > 1)
            console.print(f"── {of}sample {one.sample + 1} of {samples}, seed {settings.seed + one.sample}", style="dim")
        if probabilities:
            _show(loaded, prompts[one.prompt], one)
        else:
            print(prompts[one.prompt].lstrip("\n") + one.text)
    if probabilities:
        shares = ", ".join(f"[{colour}]{'from' if least else 'below'} {least or 0.02:.0%}[/]" for least, colour in _COLOURS)
        console.print(f"[dim]the probability of each token:[/] {shares}")


def _best(loaded: Loaded, prompts: list[str], beams: int, samples: int, max_tokens: int) -> None:
    """The best texts of a beam search, each under its log-probability where there are several."""
    if samples > beams > 0:
        raise ConfigError(f"--samples {samples}: a search with --beams {beams} has no more than that many texts")
    tokenizer = loaded.tokenizer
    for prompt in prompts:
        ids = prompt_ids(tokenizer, prompt)
        found = beam_search(loaded.model, ids, beams=beams, max_tokens=max_tokens, end=tokenizer.end_of_text)[:samples]
        for one in found:
            if len(prompts) * samples > 1:
                console.print(f"── log-probability {one.logprob:.2f}, {one.score:.3f} a token", style="dim")
            print(prompt.lstrip("\n") + tokenizer.decode(one.tokens))


def _proposer(loaded: Loaded, draft: str | None, lookup: bool, device: str, precision: str) -> Callable[[Sampling], Proposer] | None:
    """What proposes tokens, if anything does. Raises ConfigError for two of them, or a draft with another tokeniser."""
    if draft is not None and lookup:
        raise ConfigError("--draft and --lookup: one of them proposes tokens")
    if lookup:
        return lambda _: Lookup(loaded.tokenizer.vocabulary, device)
    if draft is None:
        return None
    smaller = load(draft, device=device)
    if digest(to_json(smaller.tokenizer)) != digest(to_json(loaded.tokenizer)):
        raise ConfigError(f"--draft {draft} was trained with another tokeniser, whose tokens mean other texts")
    model = for_generation(smaller.model, precision)
    return lambda settings: Draft(model, settings)


def _prompts(prompt: str | None, file: Path | None, lines: bool) -> list[str]:
    if file is None:
        if lines:
            raise ConfigError("--lines is of a --prompt-file, whose lines are prompts of their own")
        return ["\n" if prompt is None else prompt]
    if prompt is not None:
        raise ConfigError("--prompt and --prompt-file: one of them")
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompt-file {file} cannot be read ({error})") from error
    found = [line for line in text.splitlines() if line] if lines else [text.removesuffix("\n")]
    if not found or not found[0]:
        raise ConfigError(f"--prompt-file {file} is empty")
    return found


def _show(loaded: Loaded, prompt: str, one: Completion) -> None:
    """The text, each token in the colour of its probability; where colours are not to be had, a token a line."""
    stream, shown = TextStream(loaded.tokenizer), Text().append(prompt.lstrip("\n"), style="dim")
    for token, logprob in zip(one.tokens, one.logprobs or [], strict=True):
        p, piece = math.exp(logprob), stream.feed(token)
        if console.is_terminal:
            shown.append(piece, style=next(colour for least, colour in _COLOURS if p >= least))
        else:
            print(f"{p:.4f}  {json.dumps(loaded.tokenizer.decode([token]), ensure_ascii=False)}")
    if console.is_terminal:
        shown.append(stream.finish())
        console.print(shown)
