"""English-like text, the same on every machine: sentences drawn from a few hundred words by a seed."""

import random

ARTICLES = "the a this every one another that some"
ADJECTIVES = """small heavy quiet narrow early careful bright distant broken common simple northern empty sudden
gentle hollow silver ancient useful wooden bitter modest crowded faithful curious"""
NOUNS = """river garden engine letter window captain market forest signal teacher harbour machine number village
question journey morning winter mountain answer bridge kitchen library painter soldier station valley village measure
history shelter merchant compass current blanket doctor feather hammer island"""
VERBS = """carries follows remembers measures opens crosses repairs answers collects describes leaves watches
changes gathers prevents explains returns builds counts divides enters forgets guards holds joins keeps lifts"""
ADVERBS = "slowly again rarely together quickly almost always never quietly twice soon alone"
PLACES = "under beside behind across near within after before without against"
JOINTS = "and but because while until although where so"


def prose(length: int, seed: int = 0) -> str:
    """So many characters of text, in paragraphs; it ends wherever it is cut."""
    draw, parts, size = random.Random(seed), list[str](), 0
    while size < length:
        paragraph = " ".join(_sentence(draw) for _ in range(draw.randrange(3, 8)))
        parts.append(paragraph)
        size += len(paragraph) + 2
    return "\n\n".join(parts)[:length]


def _sentence(draw: random.Random) -> str:
    text = _clause(draw)
    if draw.random() < 0.4:
        text += f", {_one(draw, JOINTS)} {_clause(draw)}"
    if draw.random() < 0.15:
        text += f" ({draw.randrange(1800, 2000)})"
    return text[0].upper() + text[1:] + "."


def _clause(draw: random.Random) -> str:
    words = [_thing(draw), _one(draw, VERBS), _thing(draw)]
    if draw.random() < 0.5:
        words += [_one(draw, PLACES), _thing(draw)]
    if draw.random() < 0.3:
        words.append(_one(draw, ADVERBS))
    return " ".join(words)


def _thing(draw: random.Random) -> str:
    adjective = f"{_one(draw, ADJECTIVES)} " if draw.random() < 0.5 else ""
    return f"{_one(draw, ARTICLES)} {adjective}{_one(draw, NOUNS)}"


def _one(draw: random.Random, words: str) -> str:
    return draw.choice(words.split())
