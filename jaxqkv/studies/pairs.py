"""Pairs of texts that differ in their indirect object, and the two answers."""

from typing import NamedTuple

from jaxqkv.errors import JaxqkvError
from jaxqkv.studies.options import PairOfTexts


class Pair(NamedTuple):
    """A clean text, a donor with the same number of tokens and the other answer, and the two answers."""

    clean: str
    donor: str
    answers: tuple[str, str]


def _sentences(first: str, second: str, place: str, thing: str) -> Pair:
    beginning = f"When{first} and{second} went to the {place},"
    ends = (f"{name} gave a {thing} to" for name in (second, first))
    clean, donor = (beginning + end for end in ends)
    return Pair(clean, donor, (first, second))


PAIR = _sentences(" Mike", " Emma", "cafe", "coffee")
# The pair for the bundled checkpoint, in whose vocabulary these names are single tokens.
DEMO_PAIR = _sentences(" John", " Mary", "house", "book")


def chosen_pair(options: PairOfTexts, demo: bool) -> Pair:
    """Returns the pair in the options; what they leave out is the study's own, or the demo's.

    Raises:
      JaxqkvError: unless there are two answers.
    """
    own = DEMO_PAIR if demo else PAIR
    if options.answers and len(options.answers) != 2:
        raise JaxqkvError(f"--answers are two words, not {len(options.answers)}")
    first, second = options.answers or own.answers
    return Pair(options.clean or own.clean, options.donor or own.donor, (first, second))
