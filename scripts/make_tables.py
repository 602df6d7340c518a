"""Rewrites the generated tables of the documents: `python scripts/make_tables.py`.

From the registry: the table of studies in README.md and the figures of each study in jaxqkv/studies/README.md. A study
needs a section of that file: its name as the heading, the question that it asks in italics, and the place for its
figures. From scripts/benchmark.json and scripts/benchmark-gpu.json: the tables of the benchmark in scripts/README.md.
"""

import re
from pathlib import Path
from typing import NamedTuple

from benchmarks import report
from benchmarks.report import write_readme

from jaxqkv.studies import registry
from jaxqkv.studies.study import Study

ROOT = Path(__file__).parents[1]
README, STUDIES = ROOT / "README.md", ROOT / "jaxqkv" / "studies" / "README.md"


class Table(NamedTuple):
    """A generated table, the file that has it, and the name of its place there."""

    path: Path
    mark: str
    content: str


def tables() -> list[Table]:
    """Returns every generated table, as the registry and the published numbers have it now."""
    of_studies = [Table(STUDIES, f"figures of {study.name}", figures(study)) for study in registry.studies()]
    of_benchmark = [Table(report.README, mark, content) for mark, content in report.tables().items()]
    return [Table(README, "studies", studies()), *of_studies, *of_benchmark]


def studies() -> str:
    """Returns a row for each study."""
    text = STUDIES.read_text(encoding="utf-8")
    where = STUDIES.relative_to(ROOT).as_posix()
    rows = ["| study | question | checkpoints | figures |", "|---|---|---|---:|"]
    for study in registry.studies():
        models = ", ".join(f"`{model}`" for model in study.models)
        link = f"[`{study.name}`]({where}#{study.name})"
        rows.append(f"| {link} | {question(text, study.name)} | {models} | {len(study.figures)} |")
    return "\n".join(rows)


def figures(study: Study) -> str:
    """Returns a row for each figure of a study."""
    rows = ["| id | figure | arrays |", "|---|---|---|"]
    return "\n".join([*rows, *(f"| {spec.id} | {spec.title} | `{spec.arrays}` |" for spec in study.figures.values())])


def question(text: str, name: str) -> str:
    """Returns the question that the section of a study begins with.

    Raises:
      ValueError: if it begins with something else, or is not there.
    """
    found = re.search(rf"^## {re.escape(name)}\n\n\*([^*]+\?)\*\n", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"{STUDIES}: no section {name!r} that begins with a question in italics")
    return found[1].replace("\n", " ")


def main() -> None:
    for table in tables():
        write_readme(*table)


if __name__ == "__main__":
    main()
