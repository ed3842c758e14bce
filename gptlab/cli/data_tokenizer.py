"""What `gptlab data tokenizer train` and `report` print."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.padding import Padding
from rich.style import Style
from rich.table import Table
from rich.text import Text

from gptlab.config.errors import ConfigError, DataError, IOFailure
from gptlab.config.slots import Options
from gptlab.data.tokenizer import Tokenizer, from_json, to_json
from gptlab.data.tokenizer_report import (
    TextFigures,
    TokenizerFigures,
    compare,
    describe,
    take,
    token_texts,
    tokens_of,
)
from gptlab.tracker.console import console, say

_BACKGROUNDS = tuple(Style(color="black", bgcolor=colour) for colour in ("#a6cee3", "#fdd49e", "#b8e0b0", "#e5c4e0"))
_EXCERPT = (300, 8)  # characters and lines of the sample that are shown in tokens where no text was given
_NAMES = 18  # the width of what stands before a list of tokens
_MARKS = {" ": "·", "\n": "↵", "\t": "→", "\r": "␍", "\u00a0": "⍽"}


def report(texts: Iterable[str], tokenizers: dict[str, Tokenizer], *, show: str, as_json: bool) -> None:
    """Print what each tokeniser makes of the beginning of the texts, and of `show` (empty: of a short excerpt) token by token."""
    if not tokenizers:
        raise ConfigError("a report needs a tokeniser; name one such as data/tokenizer=gpt2")
    sample = take(texts)
    text, found = describe(sample), compare(tokenizers, sample)
    if as_json:
        print(json.dumps({"text": asdict(text), "tokenizers": [asdict(f) for f in found]}, indent=1, ensure_ascii=False))
        return
    _print_text(text)
    console.print(_figures(found[0]) if len(found) == 1 else _comparison(found))
    for figures in found:
        if len(found) > 1:
            say((figures.name, "bold"))
        _print_examples(figures)
        say()
    shown = show or excerpt(sample.texts[0])
    legend = "  ".join(f"{mark} {name}" for mark, name in (("·", "space"), ("→", "tab"), ("↵", "end of line"), ("\\xe6", "a lone byte")))
    say(("a text in tokens ", "bold"), (f"  {legend}", "dim"))
    for name, tokenizer in tokenizers.items():
        show_tokens(name, tokenizer, shown)


def train(texts: Iterable[str], tokenizer: Tokenizer, options: Options, *, out: Path, as_json: bool) -> None:
    """Fit a tokeniser on texts and write it to a file, which `read` reads. `options` are those it was built with.

    Raises ConfigError when there is nothing to learn or too little to learn from, IOFailure when the file cannot be written.
    """
    seen = {"characters": 0, "bytes": 0}

    def counted() -> Iterator[str]:
        for text in texts:
            seen["characters"] += len(text)
            seen["bytes"] += len(text.encode("utf-8", "replace"))
            yield text

    start = time.perf_counter()
    live = console.is_terminal and not as_json
    with console.status(f"learning {tokenizer.name}") if live else nullcontext():
        tokenizer.fit(counted())
    seconds = time.perf_counter() - start
    if not tokenizer.state():
        raise ConfigError(f"data/tokenizer={tokenizer.name} has nothing to learn; it is used as it is")
    content = json.dumps(to_json(tokenizer, options), indent=1, ensure_ascii=False) + "\n"
    _write(out, content)
    size = len(content.encode("utf-8"))
    if as_json:
        told = {"file": str(out), "file_bytes": size, "vocabulary": tokenizer.vocabulary, "seconds": seconds, **seen}
        print(json.dumps(told, indent=1))
        return
    text = f"{_size(seen['bytes'])} of text ({seen['characters']:,} characters)"
    say((f"{tokenizer.name} ", "bold"), f"{tokenizer.vocabulary:,} tokens, learned in {seconds:.1f} s from {text}")
    special: dict[str, int] = getattr(tokenizer, "special", {})
    learned = range(256, tokenizer.vocabulary - len(special)) if special else range(tokenizer.vocabulary)
    _list("first learned", [Text(short(t)) for t in tokens_of(tokenizer, learned[:20])])
    _list("last learned", [Text(short(t)) for t in tokens_of(tokenizer, learned[20:][-20:])])
    _list("special", [Text(t) for t in special])
    _list("written to", [Text(str(out)), Text(f"({_size(size)})", "dim")])


def _write(file: Path, content: str) -> None:
    """Write a file whole or not at all. Raises IOFailure."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise IOFailure(f"{file} could not be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):  # it was renamed, or never made
            temporary.unlink()


def read(file: Path) -> Tokenizer:
    """The tokeniser that `train` wrote. Raises IOFailure, or DataError when the file is none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise IOFailure(f"{file} could not be read ({error.strerror or error})") from error
    except ValueError as error:
        raise DataError(f"{file} is not a tokeniser written by `gptlab data tokenizer train` ({error})") from error
    if not isinstance(data, dict) or not {"name", "state", "vocabulary"} <= set(data):
        raise DataError(f"{file} is not a tokeniser written by `gptlab data tokenizer train`")
    return from_json(data, str(file))


def show_tokens(name: str, tokenizer: Tokenizer, text: str) -> None:
    """A text in tokens: each on its own background, or parted by │ where there is no colour."""
    try:
        tokens = token_texts(tokenizer, text)
    except ConfigError as error:  # a tokeniser of characters knows not every text
        say((f"  {name}", "cyan"), (f"  {error}", "yellow"))
        return
    say((f"  {name}", "cyan"), (f"  {len(tokens):,} tokens for {len(text):,} characters", "dim"))
    shown = coloured(tokens, colour=console.color_system is not None and not console.no_color)
    console.print(Padding(shown, (0, 0, 1, 2), expand=False), soft_wrap=False)


def coloured(tokens: list[str], *, colour: bool) -> Text:
    """Tokens side by side, white space made visible, a new line after each token that ends one."""
    shown = Text(overflow="fold", no_wrap=False)
    for i, token in enumerate(tokens):
        shown.append(visible(token), _BACKGROUNDS[i % len(_BACKGROUNDS)] if colour else None)
        if token.endswith("\n"):
            shown.append("\n")
        elif not colour and i + 1 < len(tokens):
            shown.append("│")
    return shown


def visible(token: str) -> str:
    """A token with its white space and what has no shape of its own made visible."""
    return "".join(_MARKS.get(c, c if c.isprintable() else c.encode("unicode_escape").decode("ascii")) for c in token)


def short(token: str, most: int = 24) -> str:
    """`visible`, at most so long: a run of one character is counted, anything else is cut."""
    if len(token) > 6 and len(set(token)) == 1:
        return f"{visible(token[0])} × {len(token)}"
    shown = visible(token)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def excerpt(text: str) -> str:
    """A few lines from the beginning of a text, ending with a word."""
    most, lines = _EXCERPT
    start = "".join(text.lstrip().splitlines(keepends=True)[:lines]).rstrip()
    if len(start) <= most:
        return start
    cut = start[:most]
    border = max(cut.rfind(" "), cut.rfind("\n"))
    return cut[:border].rstrip() if border > 0 else cut


def _print_text(text: TextFigures) -> None:
    part = "" if text.whole else "the first "
    say(
        ("text ", "bold"),
        f"{part}{_size(text.bytes)}, {text.characters:,} characters ({text.distinct_characters:,} distinct), {text.words:,} words",
    )
    pairs = text.character_pairs
    say(
        f"     {pairs.found:,} of the {pairs.possible:,} possible pairs of its characters stand side by side ({pairs.share:.1%})",
    )


def _figures(figures: TokenizerFigures) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=True)
    shown.add_column(figures.name, style="cyan", no_wrap=True)
    shown.add_column("", justify="right", style="bold", no_wrap=True)
    shown.add_column("", style="dim")
    single, unused, pairs = figures.single_byte, figures.unused, figures.token_pairs
    shown.add_row("vocabulary", f"{figures.vocabulary:,}", "tokens, special ones included")
    shown.add_row("tokens", f"{figures.tokens:,}", "that the text becomes")
    shown.add_row("bytes per token", f"{figures.bytes_per_token:.2f}", "1 is no compression")
    shown.add_row("characters per token", f"{figures.characters_per_token:.2f}", "")
    shown.add_row("tokens per word", f"{figures.tokens_per_word:.2f}", "a word is what white space separates")
    shown.add_row("single-byte tokens", f"{single.share:.1%}", f"{single.found:,} of the text's tokens")
    shown.add_row("unused tokens", f"{unused.share:.1%}", f"{unused.found:,} of {unused.possible:,} never occur in the text")
    shown.add_row("token pairs", f"{pairs.share:.2%}", f"{pairs.found:,} of {pairs.possible:,} possible pairs occur")
    shown.add_row("speed", _speed(figures), "MB/s, one thread")
    return shown


def _comparison(found: list[TokenizerFigures]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    shown.add_column("tokeniser", style="cyan", no_wrap=True)
    for name in (
        "vocabulary",
        "tokens",
        "bytes/\ntoken",
        "tokens/\nword",
        "single\nbytes",
        "unused\ntokens",
        "MB/s",
    ):
        shown.add_column(name, justify="right", no_wrap=True)
    least = min(f.tokens for f in found)
    for figures in found:
        shown.add_row(
            figures.name,
            f"{figures.vocabulary:,}",
            f"{figures.tokens:,}",
            f"{figures.bytes_per_token:.2f}",
            f"{figures.tokens_per_word:.2f}",
            f"{figures.single_byte.share:.1%}",
            f"{figures.unused.share:.1%}",
            _speed(figures),
            style="bold" if figures.tokens == least else None,
        )
    return shown


def _speed(figures: TokenizerFigures) -> str:
    return f"{figures.speed:,.0f}" if figures.speed >= 100 else f"{figures.speed:.1f}"


def _print_examples(figures: TokenizerFigures) -> None:
    _list("most frequent", [Text(short(t.text)).append(f" {t.count / figures.tokens:.1%}", "dim") for t in figures.most_frequent])
    _list("longest words", [Text(short(t.text)) for t in figures.longest])
    _list("unused", [Text(short(t.text)) for t in figures.unused_examples])


def _list(name: str, items: list[Text]) -> None:
    """Items side by side in as many lines as they need, none broken in two; nothing where there are none."""
    line = Text(f"  {name}".ljust(_NAMES), "dim")
    for i, item in enumerate(items):
        part = Text("   " if line.cell_len > _NAMES else "").append_text(item)
        if i and line.cell_len + part.cell_len > console.width:
            console.print(line)
            line, part = Text(" " * _NAMES), item
        line = Text.assemble(line, part)
    if items:
        console.print(line)


def _size(size: int) -> str:
    for unit, letters in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {letters}"
    return f"{size} bytes"
