"""The two errors of the package, both with messages written for the person at the keyboard."""


class JaxqkvError(Exception):
    """Something the user can put right: what is wrong, where, and what to do, in one line."""


class CheckpointError(JaxqkvError):
    """A checkpoint that cannot be found, read or understood."""
