"""Figures of studies that are not drawn."""

from jaxqkv.studies.options import from_keywords


def displayed(study, id, **options):
    """Returns what `study.figure(id, **options)` draws, without drawing it."""
    (spec,) = study.select([id])
    with study.start(from_keywords(study.options, options, study.name)) as run:
        return spec.display(run, run.compute(study.needs([spec])))
