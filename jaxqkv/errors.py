"""The errors of the package, all with messages written for the person at the keyboard."""


class JaxqkvError(Exception):
    """Something the user can put right: what is wrong, where, and what to do, in one line."""


class CheckpointError(JaxqkvError):
    """A checkpoint that cannot be found, read or understood."""


class CorpusError(JaxqkvError):
    """Documents that cannot be found or read, or are too few."""


class NotDrawable(JaxqkvError):
    """A figure that makes no sense for this checkpoint or this text; the others are drawn."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, cut to a line."""
    return (str(error).strip().splitlines() or ["no message"])[0]
