"""Figures of studies that are not drawn, or drawn quickly."""

import contextlib

import pytest

from jaxqkv.figures import drawing
from jaxqkv.studies.options import from_keywords


def displayed(study, id, **options):
    """Returns what `study.figure(id, **options)` draws, without drawing it."""
    (spec,) = study.select([id])
    with study.start(from_keywords(study.options, options, study.name)) as run:
        return spec.display(run, run.compute(study.needs([spec])))


@contextlib.contextmanager
def without_layout():
    """Pictures are drawn, but not laid out in the block, which is half of the work.

    For tests of what is drawn; matplotlib's layout is the same for all, and runs in other tests of figures.
    """
    whole = drawing.drawn

    def drawn(*arguments):
        figure = whole(*arguments)
        figure.set_layout_engine("none")
        return figure

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(drawing, "drawn", drawn)
        yield
