"""The errors of the package, all with messages written for the person at the keyboard."""

import difflib
from collections.abc import Collection, Sequence

# Most characters of a message, and most names in a list.
LONGEST, MOST_NAMED = 2000, 12


class JaxqkvError(Exception):
    """An error that the user can put right: what is wrong, where, and what to do, in one line."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class CheckpointError(JaxqkvError):
    """A checkpoint that cannot be found, read or understood."""


class NoTokenizer(CheckpointError):
    """A checkpoint without a tokenizer: some folders, and fresh weights when the hub is out of reach."""


class CorpusError(JaxqkvError):
    """Texts and documents that cannot be found or read, or are too few."""


class NotDrawable(JaxqkvError):
    """A figure that makes no sense for this checkpoint or this text; the others are drawn."""


class KernelError(NotDrawable, ValueError):
    """Values or settings that a kernel cannot take; a figure of them is left out."""


class JaxqkvWarning(UserWarning):
    """A warning about the results; the command prints it in one line."""


def printable(text: str) -> str:
    """Returns text, perhaps from a file, as one line of printable characters and limited length."""
    text = escaped(text)
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]} … ({len(text) - 2 * half:,} characters) … {text[-half:]}"
    return text


def escaped(text: str) -> str:
    """Returns text with escape sequences for unprintable characters."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def listed(things: Sequence[str], separator: str = ", ") -> str:
    """Joins the first dozen names of a list, and says how many more there are."""
    more = [f"and {len(things) - MOST_NAMED:,} more"] if len(things) > MOST_NAMED else []
    return separator.join([*things[:MOST_NAMED], *more])


def first_line(error: BaseException) -> str:
    """Returns the first line of another library's error message."""
    return (str(error).strip().splitlines() or ["no message"])[0]


def nearest(name: str, names: Collection[str]) -> str:
    """Returns the end of an error about an unknown name: the nearest names, or all names if none is near."""
    same = [each for each in names if each.casefold() == name.casefold()]
    near = same or difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(names)}"
