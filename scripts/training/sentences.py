"""Made sentences with two names, one of which comes again: "When A and B went to the P, A gave a T to" → B.

Some pairs of names and one template are held out, to test generalisation.
"""

from typing import NamedTuple

import numpy as np

NAMES = [
    "John", "Mary", "Tom", "Emma", "Mike", "James", "Anna", "Jane", "George", "Kate", "Peter", "Paul", "Alice", "Henry",
    "Rose", "Charles", "Sarah", "David", "Lucy", "Simon", "Mark", "Helen", "Jack", "Robert", "Susan", "Arthur", "Julia",
    "Thomas", "Frank", "Martha", "Harry", "Grace", "William", "Elizabeth", "Edward", "Maria", "Joe", "Fred", "Clara",
    "Dan",
]  # fmt: skip
PLACES = [
    "house", "church", "garden", "school", "park", "river", "station", "market", "shop", "library", "city", "village",
    "farm", "hotel", "theatre", "cafe", "castle", "town", "hospital", "beach", "office", "forest", "bridge", "kitchen",
]  # fmt: skip
THINGS = [
    "book", "letter", "ring", "coat", "glass", "watch", "flower", "ball", "key", "bottle", "drink", "knife", "card",
    "pen", "coffee", "picture", "horse", "hat", "box", "paper", "dog", "cup", "gift", "stone", "bag", "map", "song",
    "coin",
]  # fmt: skip
# Templates: {a} and {b} are the names, {s} is the one that acts and {o} the other.
TEMPLATES = (
    "When {a} and {b} went to the {place}, {s} gave a {thing} to {o}.",
    "After {a} and {b} came to the {place}, {s} handed a {thing} to {o}.",
    "While {a} and {b} were working at the {place}, {s} brought the {thing} to {o}.",
    "Yesterday {a} met {b} at the {place}, and {s} sold a {thing} to {o}.",
    "One day {a} went to the {place} with {b}. Then {s} showed the {thing} to {o}.",
    "Once {a} and {b} had left the {place}, {s} offered a {thing} to {o}.",
    "Then {a} and {b} walked to the {place}. There {s} sent a {thing} to {o}.",
    "At the {place} there were {a} and {b}, and {s} gave the {thing} to {o}.",
)
HELD_OUT_TEMPLATE = "As {a} and {b} waited at the {place}, {s} passed a {thing} to {o}."
# Held-out pairs, which studies use; a fifth of the others is also held out.
HELD_OUT_PAIRS = (("Mike", "Emma"), ("John", "Mary"))
HELD_OUT_SCENE = ("cafe", "coffee")


class Sentence(NamedTuple):
    """A sentence up to its last word, that word, and the other name.

    Attributes:
      prompt: the sentence without its last word, and without a final space.
      answer: the name that comes next.
      other: the name that acts.
    """

    prompt: str
    answer: str
    other: str


def is_held_out(a: str, b: str) -> bool:
    """Returns whether no training sentence has these two names, in either order."""
    if (a, b) in HELD_OUT_PAIRS or (b, a) in HELD_OUT_PAIRS:
        return True
    return (NAMES.index(a) + NAMES.index(b)) % 5 == 0


def make_sentence(generator: np.random.Generator, held_out: bool, template: str | None = None) -> Sentence:
    """Returns a random sentence from held-out or other pairs of names, and from a random template unless given."""
    template = template or TEMPLATES[generator.integers(len(TEMPLATES))]
    while True:
        a, b = (NAMES[index] for index in generator.choice(len(NAMES), 2, replace=False))
        place, thing = PLACES[generator.integers(len(PLACES))], THINGS[generator.integers(len(THINGS))]
        if is_held_out(a, b) == held_out and (place, thing) != HELD_OUT_SCENE:
            break
    s, o = (a, b) if generator.random() < 0.5 else (b, a)
    whole = template.format(a=a, b=b, s=s, o=o, place=place, thing=thing)
    return Sentence(whole.removesuffix(f" {o}."), o, s)


def make_sentences(count: int, seed: int) -> list[str]:
    """Returns whole training sentences."""
    generator = np.random.default_rng(seed)
    sentences = (make_sentence(generator, held_out=False) for _ in range(count))
    return [f"{sentence.prompt} {sentence.answer}." for sentence in sentences]
