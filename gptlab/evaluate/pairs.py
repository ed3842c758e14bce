"""Minimal pairs: two sentences that differ in one point of grammar, the first of them grammatical (as in BLiMP, Warstadt et al., 2020).

They are made of short lists of common words, in English and in German, drawn the same way each time.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

Pair = tuple[str, str]
Draw = Callable[[Random], Pair]
PAIRS = 100  # of each phenomenon

# English

NOUNS = {
    "man": "men", "woman": "women", "child": "children", "king": "kings", "queen": "queens", "boy": "boys", "girl": "girls",
    "dog": "dogs", "horse": "horses", "bird": "birds", "friend": "friends", "soldier": "soldiers", "brother": "brothers", "lord": "lords",
}  # fmt: skip
PLACES = {"tree": "trees", "house": "houses", "river": "rivers", "table": "tables", "door": "doors", "stone": "stones", "gate": "gates"}
VERBS = {
    "sleeps": "sleep", "sings": "sing", "runs": "run", "waits": "wait", "laughs": "laugh", "reads": "read", "works": "work",
    "speaks": "speak", "stands": "stand", "falls": "fall", "comes": "come", "weeps": "weep",
}  # fmt: skip
SEEING = {"sees": "see", "knows": "know", "hears": "hear", "loves": "love", "follows": "follow", "finds": "find"}
PREPOSITIONS = ("near", "behind", "beside", "by")
SELVES = {
    "man": "himself", "king": "himself", "boy": "himself", "lord": "himself",
    "woman": "herself", "queen": "herself", "girl": "herself", "mother": "herself",
    "men": "themselves", "women": "themselves", "children": "themselves", "soldiers": "themselves",
}  # fmt: skip
VOWELS = ("apple", "egg", "orange", "island", "animal", "uncle", "arm", "eye", "enemy", "oath")
CONSONANTS = ("dog", "house", "book", "table", "horse", "king", "friend", "door", "garden", "letter")
CASES = (("he", "him"), ("she", "her"), ("they", "them"), ("we", "us"), ("I", "me"))
FORMS = (
    ("ate", "eaten"), ("spoke", "spoken"), ("wrote", "written"), ("took", "taken"), ("saw", "seen"), ("went", "gone"), ("gave", "given"),
    ("fell", "fallen"), ("knew", "known"), ("began", "begun"), ("sang", "sung"), ("broke", "broken"), ("drank", "drunk"),
)  # fmt: skip
ADJECTIVES = ("old", "young", "good", "poor", "great", "small", "strong", "happy")


def _agreement(draw: Random) -> Pair:
    (one, many), verb = draw.choice(list(NOUNS.items())), draw.choice(list(VERBS.items()))
    plural = draw.random() < 0.5
    return _number(f"The {many if plural else one}", verb, plural)


def _number(subject: str, verb: tuple[str, str], plural: bool) -> Pair:
    right, wrong = (verb[1], verb[0]) if plural else verb
    return f"{subject} {right}.", f"{subject} {wrong}."


def _attractor(draw: Random) -> Pair:
    noun, place = draw.choice(list(NOUNS.items())), draw.choice(list(PLACES.items()))
    plural = draw.random() < 0.5
    subject = f"The {noun[plural]} {draw.choice(PREPOSITIONS)} the {place[not plural]}"
    return _number(subject, draw.choice(list(VERBS.items())), plural)


def _relative(draw: Random) -> Pair:
    noun, other = draw.sample(list(NOUNS.items()), 2)
    plural = draw.random() < 0.5
    subject = f"The {noun[plural]} that the {other[not plural]} {draw.choice(list(SEEING.items()))[not plural]}"
    return _number(subject, draw.choice(list(VERBS.items())), plural)


def _determiner(draw: Random) -> Pair:
    noun, (one, many) = draw.choice(list((NOUNS | PLACES).items())), draw.choice((("this", "these"), ("that", "those")))
    plural, who = draw.random() < 0.5, draw.choice(("I see", "We know", "They find"))
    right, wrong = (many, one) if plural else (one, many)
    return f"{who} {right} {noun[plural]}.", f"{who} {wrong} {noun[plural]}."


def _reflexive(draw: Random) -> Pair:
    subject, right = draw.choice(list(SELVES.items()))
    wrong = draw.choice([word for word in ("himself", "herself", "themselves") if word != right])
    verb = draw.choice(list(SEEING.items()))[right == "themselves"]
    return f"The {subject} {verb} {right}.", f"The {subject} {verb} {wrong}."


def _article(draw: Random) -> Pair:
    vowel = draw.random() < 0.5
    noun, who = draw.choice(VOWELS if vowel else CONSONANTS), draw.choice(("He has", "She sees", "I want", "They find", "It is"))
    right, wrong = ("an", "a") if vowel else ("a", "an")
    return f"{who} {right} {noun}.", f"{who} {wrong} {noun}."


def _pronoun(draw: Random) -> Pair:
    subject, object_ = draw.choice(CASES)
    verb = draw.choice(list(SEEING.items()))
    noun = draw.choice(list(NOUNS))
    if draw.random() < 0.5:
        return f"The {noun} {verb[0]} {object_}.", f"The {noun} {verb[0]} {subject}."
    form = verb[subject not in ("he", "she")]
    wrong = object_[0].upper() + object_[1:]
    return f"{subject[0].upper()}{subject[1:]} {form} the {noun}.", f"{wrong} {form} the {noun}."


def _polarity(draw: Random) -> Pair:
    noun, (_, participle) = draw.choice(list(NOUNS)), draw.choice(FORMS)
    return f"No {noun} has ever {participle}.", f"Some {noun} has ever {participle}."


def _form(draw: Random) -> Pair:
    (past, participle), noun = draw.choice(FORMS), draw.choice(list(NOUNS))
    if draw.random() < 0.5:
        return f"The {noun} has {participle}.", f"The {noun} has {past}."
    return f"The {noun} {past}.", f"The {noun} {participle}."


def _order(draw: Random) -> Pair:
    noun, verb, adjective = draw.choice(list(NOUNS)), draw.choice(list(VERBS)), draw.choice(ADJECTIVES)
    return f"The {adjective} {noun} {verb}.", f"The {noun} {adjective} {verb}."


# German: gender, singular, plural, dative plural

NOMEN = (
    ("m", "Hund", "Hunde", "Hunden"), ("m", "Mann", "Männer", "Männern"), ("m", "Freund", "Freunde", "Freunden"),
    ("m", "Vater", "Väter", "Vätern"), ("m", "Sohn", "Söhne", "Söhnen"), ("m", "Gast", "Gäste", "Gästen"),
    ("f", "Frau", "Frauen", "Frauen"), ("f", "Katze", "Katzen", "Katzen"), ("f", "Mutter", "Mütter", "Müttern"),
    ("f", "Schwester", "Schwestern", "Schwestern"), ("f", "Tochter", "Töchter", "Töchtern"),
    ("n", "Kind", "Kinder", "Kindern"), ("n", "Pferd", "Pferde", "Pferden"), ("n", "Tier", "Tiere", "Tieren"),
)  # fmt: skip
ORTE = (
    ("m", "Baum", "Bäume", "Bäumen"), ("m", "Tisch", "Tische", "Tischen"), ("f", "Wand", "Wände", "Wänden"),
    ("n", "Haus", "Häuser", "Häusern"), ("m", "Berg", "Berge", "Bergen"), ("n", "Boot", "Boote", "Booten"),
)  # fmt: skip
VERBEN = (
    ("schläft", "schlafen"), ("singt", "singen"), ("läuft", "laufen"), ("wartet", "warten"), ("lacht", "lachen"), ("liest", "lesen"),
    ("arbeitet", "arbeiten"), ("spricht", "sprechen"), ("steht", "stehen"), ("kommt", "kommen"), ("geht", "gehen"), ("fragt", "fragen"),
)  # fmt: skip
DER, DEM, DEN = {"m": "der", "f": "die", "n": "das"}, {"m": "dem", "f": "der", "n": "dem"}, {"m": "den", "f": "die", "n": "das"}
ENDUNG = {"m": "er", "f": "e", "n": "es"}
EIGENSCHAFTEN = ("alt", "jung", "klein", "arm", "stark", "fremd", "neu", "klug")
MIT_SEIN = ("gegangen", "gekommen", "gestorben", "gereist", "gewachsen", "erschienen", "aufgewacht", "eingeschlafen")
MIT_HABEN = ("gelacht", "gearbeitet", "geschlafen", "gewartet", "geweint", "gelebt", "gehofft", "gezweifelt")
SICH = (("Ich", "mich", "e"), ("Du", "dich", "st"), ("Er", "sich", "t"), ("Sie", "sich", "t"), ("Wir", "uns", "en"), ("Ihr", "euch", "t"))
REFLEXIV = ("schäm", "beeil", "erhol", "weiger", "verlieb", "bedank")  # verbs that take no other object


def _kongruenz(draw: Random) -> Pair:
    gender, one, many, _ = draw.choice(NOMEN)
    plural = draw.random() < 0.5
    return _number(f"Die {many}" if plural else f"{DER[gender].capitalize()} {one}", draw.choice(VERBEN), plural)


def _einschub(draw: Random) -> Pair:
    gender, one, many, _ = draw.choice(NOMEN)
    place, near, _, nears = draw.choice(ORTE)
    plural, preposition = draw.random() < 0.5, draw.choice(("neben", "hinter", "vor", "bei"))
    subject = f"Die {many}" if plural else f"{DER[gender].capitalize()} {one}"
    between = f"{preposition} {DEM[place]} {near}" if plural else f"{preposition} den {nears}"
    return _number(f"{subject} {between}", draw.choice(VERBEN), plural)


def _genus(draw: Random) -> Pair:
    gender, noun, _, _ = draw.choice(NOMEN + ORTE)
    wrong = DER[draw.choice([g for g in "mfn" if g != gender])]
    start = draw.choice(("Das ist", "Hier ist", "Dort steht", "Da kommt", "Wo ist"))
    end = "?" if start == "Wo ist" else "."
    return f"{start} {DER[gender]} {noun}{end}", f"{start} {wrong} {noun}{end}"


def _akkusativ(draw: Random) -> Pair:
    noun = draw.choice([one for gender, one, _, _ in NOMEN + ORTE if gender == "m"])
    start = draw.choice(("Ich sehe", "Wir kennen", "Die Frau sucht", "Das Kind findet", "Sie hat", "Er liebt", "Du siehst"))
    return f"{start} den {noun}.", f"{start} der {noun}."


def _dativ(draw: Random) -> Pair:
    gender, noun, _, _ = draw.choice(NOMEN)
    start = draw.choice(("Er kommt mit", "Sie spricht von", "Ich gehe zu", "Wir sind bei", "Er kommt nach"))
    return f"{start} {DEM[gender]} {noun}.", f"{start} {DEN[gender]} {noun}."


def _adjektiv(draw: Random) -> Pair:
    gender, noun, _, _ = draw.choice(NOMEN)
    wrong = ENDUNG[draw.choice([g for g in "mfn" if g != gender])]
    article, adjective = "eine" if gender == "f" else "ein", draw.choice(EIGENSCHAFTEN)
    return f"Das ist {article} {adjective}{ENDUNG[gender]} {noun}.", f"Das ist {article} {adjective}{wrong} {noun}."


def _nebensatz(draw: Random) -> Pair:
    gender, noun, _, _ = draw.choice(NOMEN)
    verb, start = draw.choice(VERBEN)[0], draw.choice(("Ich weiß, dass", "Wir hoffen, dass", "Sie sagt, dass", "Er fragt, ob"))
    return f"{start} {DER[gender]} {noun} {verb}.", f"{start} {verb} {DER[gender]} {noun}."


def _hilfsverb(draw: Random) -> Pair:
    gender, noun, _, _ = draw.choice(NOMEN)
    participle = draw.choice(MIT_SEIN + MIT_HABEN)
    right, wrong = ("ist", "hat") if participle in MIT_SEIN else ("hat", "ist")
    subject = f"{DER[gender].capitalize()} {noun}"
    return f"{subject} {right} {participle}.", f"{subject} {wrong} {participle}."


def _reflexiv(draw: Random) -> Pair:
    (who, right, ending), stem = draw.choice(SICH), draw.choice(REFLEXIV)
    wrong = draw.choice([word for _, word, _ in SICH if word != right])
    verb = stem + ("n" if stem == "weiger" and ending == "en" else ending)
    return f"{who} {verb} {right}.", f"{who} {verb} {wrong}."


PHENOMENA: dict[str, Draw] = {
    "english/agreement": _agreement,
    "english/agreement_phrase": _attractor,
    "english/agreement_clause": _relative,
    "english/determiner": _determiner,
    "english/reflexive": _reflexive,
    "english/article": _article,
    "english/pronoun": _pronoun,
    "english/polarity": _polarity,
    "english/verb_form": _form,
    "english/word_order": _order,
    "german/agreement": _kongruenz,
    "german/agreement_phrase": _einschub,
    "german/gender": _genus,
    "german/accusative": _akkusativ,
    "german/dative": _dativ,
    "german/adjective": _adjektiv,
    "german/word_order": _nebensatz,
    "german/auxiliary": _hilfsverb,
    "german/reflexive": _reflexiv,
}


def pairs(name: str, count: int = PAIRS) -> list[Pair]:
    """Different pairs of a phenomenon, the same each time, at most so many as there are."""
    draw, found = Random(name), dict[Pair, None]()
    for _ in range(40 * count):
        found[PHENOMENA[name](draw)] = None
        if len(found) == count:
            break
    return list(found)
