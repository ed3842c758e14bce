"""Chats made up by a program, which can check their answers: what a model of few parameters can learn, without a network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Literal

from gptlab.config.errors import ConfigError
from gptlab.config.registry import register
from gptlab.data.chat import ANSWERS, Message
from gptlab.data.chat_corpus import ChatCorpus, Found
from gptlab.data.chat_records import Example

VERSION = 3  # goes up where the same options give other chats

WORDS = {
    "en": "ant apple bear blanket bread bridge candle cat chair cloud dog dream feather fire flower forest garden glass hat honey horse "
    "house island kitchen lamp letter lion market moon mountain mouse night ocean orange paper pencil rain river road rose salt sea "
    "shadow silver snow spoon stone summer sun table tiger tree umbrella village water window winter wood",
    "de": "apfel birne blume boden brief dach decke eimer ernte farbe feder fisch flamme garten glas hafen hund insel jahr kerze "
    "kinder kirche lampe leiter licht mantel messer mond mutter nebel ofen pferd regen ring salz sonne stein tisch vogel wolke",
}
NAMES = {
    "en": "Ada Ben Cleo Dan Eve Finn Gina Hugo Iris Jack Kira Leo",
    "de": "Anna Bernd Clara Dirk Eva Franz Greta Hans Ida Jan Karin Lutz",
}
DAYS = {
    "en": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "de": "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag",
}
OPPOSITES = {
    "en": "big small hot cold old new fast slow light dark high low rich poor full empty open closed early late hard soft long short",
    "de": "groß klein heiß kalt alt neu schnell langsam hell dunkel hoch tief reich arm voll leer offen zu früh spät hart weich lang kurz",
}
# Of each skill: how it may be asked for, and how the answer is put.
PHRASES: dict[str, dict[str, tuple[list[str], str]]] = {
    "en": {
        "add": (["What is {a} plus {b}?", "{a} + {b} = ?", "Add {a} and {b}.", "How much is {a} and {b} together?"],
                "{a} plus {b} is {answer}."),
        "larger": (["Which is larger, {a} or {b}?", "Is {a} or {b} the larger number?"], "{answer} is larger."),
        "spell": (["Spell the word {word}.", "How do you spell {word}?"], "{answer}"),
        "first": (["What is the first letter of {word}?", "Which letter does {word} begin with?"], "The first letter is {answer}."),
        "last": (["What is the last letter of {word}?", "Which letter does {word} end with?"], "The last letter is {answer}."),
        "upper": (["Write {word} in capitals.", "Put {word} into capital letters."], "{answer}"),
        "repeat": (["Say {word} {n} times.", "Repeat the word {word} {n} times."], "{answer}"),
        "letters": (["How many letters has {word}?", "Count the letters of {word}."], "It has {answer} letters."),
        "after": (["Which day comes after {day}?", "What day follows {day}?"], "{answer} comes after {day}."),
        "opposite": (["What is the opposite of {word}?", "Tell me the opposite of {word}."], "The opposite of {word} is {answer}."),
        "name": (["What is my name?", "Do you know my name?"], "Your name is {answer}."),
    },
    "de": {
        "add": (["Was ist {a} plus {b}?", "{a} + {b} = ?", "Addiere {a} und {b}.", "Wie viel sind {a} und {b} zusammen?"],
                "{a} plus {b} ist {answer}."),
        "larger": (["Was ist größer, {a} oder {b}?", "Ist {a} oder {b} die größere Zahl?"], "{answer} ist größer."),
        "spell": (["Buchstabiere das Wort {word}.", "Wie buchstabiert man {word}?"], "{answer}"),
        "first": (["Was ist der erste Buchstabe von {word}?", "Womit beginnt {word}?"], "Der erste Buchstabe ist {answer}."),
        "last": (["Was ist der letzte Buchstabe von {word}?", "Womit endet {word}?"], "Der letzte Buchstabe ist {answer}."),
        "upper": (["Schreibe {word} in Großbuchstaben.", "Setze {word} in Großbuchstaben."], "{answer}"),
        "repeat": (["Sage {n} Mal {word}.", "Wiederhole das Wort {word} {n} Mal."], "{answer}"),
        "letters": (["Wie viele Buchstaben hat {word}?", "Zähle die Buchstaben von {word}."], "Es hat {answer} Buchstaben."),
        "after": (["Welcher Tag kommt nach {day}?", "Was folgt auf {day}?"], "{answer} kommt nach {day}."),
        "opposite": (["Was ist das Gegenteil von {word}?", "Nenne das Gegenteil von {word}."], "Das Gegenteil von {word} ist {answer}."),
        "name": (["Wie heiße ich?", "Kennst du meinen Namen?"], "Du heißt {answer}."),
    },
}  # fmt: skip
MEETING = {
    "en": (["My name is {name}.", "Hello, I am {name}.", "Hi! I'm called {name}."], "Hello {name}, nice to meet you."),
    "de": (["Ich heiße {name}.", "Hallo, ich bin {name}.", "Guten Tag! Mein Name ist {name}."], "Hallo {name}, schön dich zu treffen."),
}
SYSTEM = {"en": "You are a helpful assistant.", "de": "Du bist ein hilfreicher Assistent."}
SKILLS = tuple(PHRASES["en"])
OF_NUMBERS = ("add", "larger")
KEPT_BACK = 1 / 16  # of the pairs of numbers
LEAST = 8  # below which so few pairs are kept back that there may be none


@register("data/corpus", "drills")
class Drills(ChatCorpus):
    """Chats made up by a program: sums, words, days, opposites, a name to keep in mind; every answer can be checked.

    Held out are chats of their own, a twentieth as many, and pairs of numbers: two that are added or compared in a held-out chat never are
    in another, whatever the seed, language and phrase. Words, days and names are few, and those of held-out chats are the others' too.

    language     en or de
    chats        how many
    skills       of these alone; empty: all (add, larger, spell, first, last, upper, repeat, letters, after, opposite, name)
    largest      numbers are below it; at least 8
    turns        questions of a chat at most: half of them have one (a name is told first), the others any number up to it
    preferences  beside each answer a worse one, wrong or rambling, for objective=dpo
    seed         of the draws; a preference or reinforcement stage takes another than the fine-tuning before it
    """

    name = "drills"
    validates = True

    def __init__(
        self,
        *,
        language: Literal["en", "de"] = "en",
        chats: int = 20000,
        skills: tuple[str, ...] = (),
        largest: int = 100,
        turns: int = 6,
        preferences: bool = False,
        seed: int = 0,
    ) -> None:
        unknown = [skill for skill in skills if skill not in SKILLS]
        if unknown:
            raise ConfigError(f"data.corpus.skills: {unknown[0]!r} is not one of {', '.join(SKILLS)}")
        if chats < 1:
            raise ConfigError(f"data.corpus.chats={chats} must be at least 1")
        if largest < LEAST:
            raise ConfigError(f"data.corpus.largest={largest} must be at least {LEAST}: of fewer numbers no pair might be held out")
        if turns < 1:
            raise ConfigError(f"data.corpus.turns={turns} must be at least 1")
        self.language, self.chats, self.skills, self.largest = language, chats, tuple(skills) or SKILLS, largest
        self.turns, self.pairs, self.seed = turns, preferences, seed

    def fingerprint(self) -> dict[str, Any]:
        return {
            "version": VERSION, "language": self.language, "chats": self.chats, "skills": list(self.skills), "largest": self.largest,
            "turns": self.turns, "pairs": self.pairs, "seed": self.seed,
        }  # fmt: skip

    def found(self, *, validation: bool = False) -> Iterator[Found]:
        draw = Random(f"drills {self.seed} held out" if validation else f"drills {self.seed}")
        for _ in range(-(-self.chats // 20) if validation else self.chats):
            yield self._example(draw, validation)

    def _example(self, draw: Random, held_out: bool) -> Example:
        """Skills in a row; a name that is told first is asked for last."""
        messages = [Message("system", SYSTEM[self.language])] if draw.random() < 0.2 else []
        skill = draw.choice(self.skills)
        told = _values(skill, self.language, self.largest, draw, held_out)
        if skill == "name":
            asked, greeted = MEETING[self.language]
            messages += [Message("user", draw.choice(asked).format(**told)), Message(ANSWERS, greeted.format(**told))]
        for _ in range(draw.randrange(1, self.turns) if self.turns > 1 and draw.random() < 0.5 else 0):
            between = draw.choice([s for s in self.skills if s != "name"] or list(self.skills))
            if between != "name":
                messages += self._turn(between, _values(between, self.language, self.largest, draw, held_out), draw)
        *asked_last, answer = self._turn(skill, told, draw)
        rejected = None
        if self.pairs:
            wrong = _wrong(skill, told, self.language, self.largest, draw)
            put = PHRASES[self.language][skill][1]
            rejected = put.format(**told | {"answer": wrong}) if draw.random() < 0.7 else f"{answer.content} {answer.content}"
        return Example((*messages, *asked_last, answer), rejected)

    def _turn(self, skill: str, told: dict[str, Any], draw: Random) -> list[Message]:
        asked, put = PHRASES[self.language][skill]
        return [Message("user", draw.choice(asked).format(**told)), Message(ANSWERS, put.format(**told))]


def kept_back(a: int, b: int) -> bool:
    """Whether two numbers are added and compared in held-out chats alone, in whichever order."""
    drawn = hashlib.sha256(f"{min(a, b)} {max(a, b)}".encode()).digest()
    return int.from_bytes(drawn[:8], "big") < KEPT_BACK * 2**64


def _values(skill: str, language: str, largest: int, draw: Random, held_out: bool | None = None) -> dict[str, Any]:
    """What a skill's phrases hold, its answer among it; numbers from one side alone, where `held_out` is told."""
    words, days = WORDS[language].split(), DAYS[language].split()
    a, b, n = draw.randrange(largest), draw.randrange(largest), draw.randint(2, 4)
    while skill in OF_NUMBERS and ((skill == "larger" and a == b) or (held_out is not None and kept_back(a, b) != held_out)):
        a, b = draw.randrange(largest), draw.randrange(largest)
    word, day, name = draw.choice(words), draw.randrange(7), draw.choice(NAMES[language].split())
    opposites = OPPOSITES[language].split()
    if skill == "opposite":
        place = draw.randrange(len(opposites))
        return {"word": opposites[place], "answer": opposites[place ^ 1]}
    answers: dict[str, Callable[[], Any]] = {
        "add": lambda: a + b,
        "larger": lambda: max(a, b),
        "spell": lambda: " ".join(word),
        "first": lambda: word[0],
        "last": lambda: word[-1],
        "upper": word.upper,
        "repeat": lambda: " ".join([word] * n),
        "letters": lambda: len(word),
        "after": lambda: days[(day + 1) % 7],
        "name": lambda: name,
    }
    return {"a": a, "b": b, "n": n, "word": word, "day": days[day], "name": name, "answer": answers[skill]()}


def _wrong(skill: str, told: dict[str, Any], language: str, largest: int, draw: Random) -> Any:
    """An answer of the same kind that is not the right one."""
    answer = told["answer"]
    if isinstance(answer, int):
        return abs(answer + draw.choice((-3, -2, -1, 1, 2, 3))) or answer + 1
    while True:
        other = _values(skill, language, largest, draw)["answer"]
        if other != answer:
            return other
