"""What a model knows and can do, as choices between texts of which the first is right: facts, sums, recall from the context, copying."""

from __future__ import annotations

from random import Random

from gptlab.data.tokenizer import Tokenizer

Texts = tuple[str, ...]
Ids = tuple[int, ...]
CHOICES = 4  # of a fact or a sum
ITEMS, SUMS = 100, 50  # of each kind; of sums of so many digits, and of copying at a distance
DISTANCES = (4, 8, 16, 32, 64, 128)  # in tokens
REPEATED = 16  # tokens of the sequence that induction repeats
POOL = 2000  # tokens of the vocabulary that are looked at for words

# Facts

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Austria": "Vienna",
    "Poland": "Warsaw", "Greece": "Athens", "Russia": "Moscow", "Japan": "Tokyo", "China": "Beijing", "Egypt": "Cairo", "Ireland": "Dublin",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Hungary": "Budapest", "Belgium": "Brussels",
    "Cuba": "Havana", "Peru": "Lima", "Iran": "Tehran", "Iraq": "Baghdad", "Kenya": "Nairobi", "Canada": "Ottawa", "Turkey": "Ankara",
    "Chile": "Santiago", "Thailand": "Bangkok", "Ukraine": "Kyiv", "England": "London",
}  # fmt: skip
HAUPTSTÄDTE = {
    "Frankreich": "Paris", "Deutschland": "Berlin", "Italien": "Rom", "Spanien": "Madrid", "Portugal": "Lissabon", "Russland": "Moskau",
    "Polen": "Warschau", "Griechenland": "Athen", "Japan": "Tokio", "China": "Peking", "Irland": "Dublin", "Norwegen": "Oslo",
    "Schweden": "Stockholm", "Finnland": "Helsinki", "Ungarn": "Budapest", "Belgien": "Brüssel", "Kuba": "Havanna", "Kanada": "Ottawa",
    "England": "London", "Dänemark": "Kopenhagen",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "good": "bad", "long": "short", "old": "young", "high": "low", "fast": "slow", "light": "dark",
    "rich": "poor", "hard": "soft", "early": "late", "strong": "weak", "wet": "dry", "full": "empty", "up": "down", "black": "white",
}  # fmt: skip
GEGENTEILE = {
    "warm": "kalt", "lang": "kurz", "gut": "schlecht", "alt": "jung", "hoch": "tief", "schnell": "langsam", "hell": "dunkel",
    "reich": "arm", "hart": "weich", "stark": "schwach", "nass": "trocken", "voll": "leer", "schwarz": "weiß", "laut": "leise",
}  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
TAGE = ("Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag")
MADE = {
    "Bread is made from": "flour", "Wine is made from": "grapes", "Cheese is made from": "milk", "Glass is made from": "sand",
    "Paper is made from": "wood", "Honey is made by": "bees", "Wool comes from": "sheep", "Eggs are laid by": "hens",
    "Milk comes from": "cows", "Silk is made by": "worms", "Ice is frozen": "water", "The sun rises in the": "east",
}  # fmt: skip


def facts(language: str) -> list[Texts]:
    """Sentences that end with the right word, and with other words of the same kind."""
    draw = Random(f"facts/{language}")
    if language == "english":
        kinds = [("The capital of {} is {}.", CAPITALS), ("The opposite of {} is {}.", OPPOSITES), ("{} {}.", MADE)]
        kinds.append(("The day after {} is {}.", dict(zip(DAYS, (*DAYS[1:], DAYS[0]), strict=True))))
    else:
        kinds = [("Die Hauptstadt von {} ist {}.", HAUPTSTÄDTE), ("Das Gegenteil von {} ist {}.", GEGENTEILE)]
        kinds.append(("Der Tag nach {} ist {}.", dict(zip(TAGE, (*TAGE[1:], TAGE[0]), strict=True))))
    return [
        (form.format(of, right), *(form.format(of, wrong) for wrong in draw.sample([w for w in known.values() if w != right], CHOICES - 1)))
        for form, known in kinds
        for of, right in known.items()
    ]


# Sums


def arithmetic() -> list[Texts]:
    """Sums, differences and products of numbers up to 99, in words as in a text."""
    draw, found = Random("arithmetic"), dict[Texts, None]()
    while len(found) < ITEMS:
        sign, (a, b) = draw.choice(("plus", "minus", "times")), sorted((draw.randint(2, 99), draw.randint(2, 99)), reverse=True)
        if sign == "times":
            a, b = draw.randint(3, 9), draw.randint(3, 9)
        right = {"plus": a + b, "minus": a - b, "times": a * b}[sign]
        if right >= 10:
            found[tuple(f"{a} {sign} {b} is {answer}." for answer in _near(right, draw))] = None
    return list(found)


def addition(digits: int) -> list[Texts]:
    """Sums of two numbers of so many digits, behind three that are worked out."""
    draw, found = Random(f"addition/{digits}"), dict[Texts, None]()
    low, high = 10 ** (digits - 1), 10**digits - 1
    while len(found) < SUMS:
        shown = [(draw.randint(low, high), draw.randint(low, high)) for _ in range(4)]
        (a, b), before = shown[-1], "".join(f"{a}+{b}={a + b}\n" for a, b in shown[:-1])
        if (a, b) not in shown[:-1]:
            found[tuple(f"{before}{a}+{b}={answer}\n" for answer in _near(a + b, draw))] = None
    return list(found)


def _near(right: int, draw: Random) -> list[int]:
    """The answer, and others of as many digits that differ from it in little."""
    steps = (-1, 1, -2, 2, -10, 10, -11, 9, 3, -3, 4, -4, -9, 11)
    near = [right + step for step in steps if right + step > 0 and len(str(right + step)) == len(str(right))]
    return [right, *draw.sample(near, CHOICES - 1)]


# Recall

NAMES = ("Tom", "Anna", "Peter", "Maria", "Paul", "Lena", "Karl", "Ida")
THINGS = ("key", "ball", "cup", "ring", "book", "hat", "knife", "stone")
DINGE = ("Schlüssel", "Ball", "Hut", "Ring", "Apfel", "Stein", "Stock", "Brief")  # of one gender, which then betrays nothing


def recall(language: str, people: int = 3) -> list[Texts]:
    """Who has what, and once more of one of them; the wrong texts give him what another has."""
    draw, found = Random(f"recall/{language}"), dict[Texts, None]()
    has, things = ("{} has the {}.", THINGS) if language == "english" else ("{} hat den {}.", DINGE)
    while len(found) < ITEMS:
        who, what = draw.sample(NAMES, people), draw.sample(things, people)
        story = " ".join(has.format(*pair) for pair in zip(who, what, strict=True))
        asked = draw.randrange(people)
        order = [what[asked], *(thing for i, thing in enumerate(what) if i != asked)]
        found[tuple(f"{story} {has.format(who[asked], thing)}" for thing in order)] = None
    return list(found)


# Copying, of tokens that make no sense


def words(tokenizer: Tokenizer) -> list[int]:
    """Tokens of letters alone; all that stand for text, where those are too few."""
    stands = [token for token, size in enumerate(tokenizer.byte_lengths().tolist()) if size]
    looked = Random(0).sample(stands, POOL) if len(stands) > POOL else stands
    letters = [token for token in looked if tokenizer.decode([token]).strip().isalpha()]
    return letters if len(letters) > 2 * REPEATED else stands


def induction(tokenizer: Tokenizer, context: int) -> list[tuple[Ids, ...]]:
    """A sequence of different tokens, and again its beginning: what came next then, or another token of it."""
    pool, draw = words(tokenizer), Random("induction")
    length = min(REPEATED, len(pool), (context + 1) // 2)
    found = []
    for _ in range(ITEMS if length > 2 else 0):
        once, seen = draw.sample(pool, length), draw.randrange(1, length)
        wrong = draw.choice([token for token in once if token not in (once[seen], once[seen - 1])])
        found.append(tuple((*once, *once[:seen], token) for token in (once[seen], wrong)))
    return found


def copying(tokenizer: Tokenizer, distance: int) -> list[tuple[Ids, ...]]:
    """A token again, and what came after it `distance` tokens ago, or another token from between."""
    pool, draw = words(tokenizer), Random(f"copying/{distance}")
    found = []
    for _ in range(SUMS if len(pool) > 3 else 0):
        first, second = draw.sample(pool, 2)
        others = [token for token in pool if token not in (first, second)]
        between = draw.choices(others, k=distance - 2)
        found.append(tuple((first, second, *between, first, token) for token in (second, draw.choice(between))))
    return found
