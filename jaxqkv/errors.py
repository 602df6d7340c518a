"""The errors of the package, all with messages written for the person at the keyboard."""


class JaxqkvError(Exception):
    """Something the user can put right: what is wrong, where, and what to do, in one line."""


class CheckpointError(JaxqkvError):
    """A checkpoint that cannot be found, read or understood."""


class NotDrawable(JaxqkvError):
    """A figure that makes no sense for this checkpoint or this text; the others are drawn."""
