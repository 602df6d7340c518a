"""Pairs of texts that differ in their indirect object, and the two answers."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxqkv.errors import JaxqkvError
from jaxqkv.studies.options import PairOfTexts
from jaxqkv.text.tokenizers import Tokenizer


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
      JaxqkvError: unless there are two answers, and for an empty text.
    """
    own = DEMO_PAIR if demo else PAIR
    texts = {name: getattr(options, name) for name in ("clean", "donor")}
    for name, text in texts.items():
        if text == "":
            raise JaxqkvError(f"--{name} is empty; give a text, or leave it out for the study's own")
        if text is None:
            texts[name] = getattr(own, name)
    if options.answers and len(options.answers) != 2:
        raise JaxqkvError(f"--answers are two words, not {len(options.answers)}")
    first, second = options.answers or own.answers
    return Pair(**texts, answers=(first, second))


def answer_tokens(tokenizer: Tokenizer, answers: Sequence[str]) -> tuple[int, int]:
    """Returns the tokens of two answers.

    Raises:
      JaxqkvError: for an answer that is not one token, and for two of the same token.
    """
    one, two = (tokenizer.single_token(word) for word in answers)
    if one == two:
        raise JaxqkvError(f"the answers {answers[0]!r} and {answers[1]!r} are the same token; they must be two")
    return one, two
