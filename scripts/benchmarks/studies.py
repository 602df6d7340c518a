"""Checkpoints, figures, texts and options of each timed study, the same for all three sides."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measuring import BenchmarkError
from jaxqkv.studies.stimuli import alice, stimuli
from jaxqkv.text.corpora import PYTHON_DOCS, open_corpus

# Upper bound on a token's characters, so that a text has enough tokens.
CHARACTERS = 6
# Arrays of prediction-divergence's figure 6 that depend on its permutations.
BY_CHANCE = (
    *("null_mean", "null_low", "null_high"),
    *("p", "q_value", "difference_p", "difference_q_value", "p_shift"),
)


@dataclasses.dataclass(frozen=True)
class StudyCase:
    """A study as it is timed.

    Attributes:
      quick, full, demo: checkpoints by the benchmark's size; empty if it is not run.
      figures: figures that the baselines compute; all of them by default.
      texts: returns the texts for the baselines.
      corpus: whether jaxqkv also gets the texts, as the documents of a corpus; else they are the study's own.
      counted: whether it counts a whole corpus, which replaces the texts.
      options: of both the command and the baselines' job.
      small: options that replace these with `--demo` and in tests.
      drawn: whether the baselines also draw the pictures.
      random: arrays that are not compared: drawn with each side's own generator, or without comparable digits.
    """

    full: tuple[str, ...]
    demo: tuple[str, ...] = ("demo-gpt2",)
    quick: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    texts: Callable[[], list[str]] = lambda: stimuli("attention_scores/purple.txt")
    corpus: bool = False
    counted: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    small: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    drawn: bool = False
    random: frozenset[tuple[str, str]] = frozenset()

    def models(self, size: str) -> tuple[str, ...]:
        """Returns the checkpoints of a size."""
        return {"quick": self.quick, "full": self.full, "demo": self.demo, "large": ()}[size]

    def settings(self, small: bool) -> dict[str, Any]:
        """Returns the options of the command and of the job."""
        return {**self.options, **(self.small if small else {})}


def passages() -> list[str]:
    """Returns the beginnings of 64 paragraphs of Alice, of different lengths."""
    lines = [line for line in alice().splitlines() if len(line) > 120]
    return [line[: 60 + 7 * (place % 19)] for place, line in enumerate(lines[:64])]


def _random(**figures: Iterable[str]) -> frozenset[tuple[str, str]]:
    """Returns pairs of a figure and an array; figures' names may begin with an underscore here."""
    return frozenset((figure.removeprefix("_"), name) for figure, names in figures.items() for name in names)


STUDIES = {
    "qkv-weights": StudyCase(
        full=("random:gpt2", "random:gpt2-medium", "random:gpt2-large", "random:gpt2-xl"), drawn=True
    ),
    "attention-scores": StudyCase(
        quick=("random:gpt2-medium",),
        full=("random:gpt2-medium",),
        drawn=True,
        random=_random(_1=("raw", "scaled")),
    ),
    "token-frequency": StudyCase(
        full=("random:bert-large-uncased",),
        demo=("demo-bert",),
        counted=True,
        options={"tokens": 1_000_000, "batch": 16},
        small={"tokens": 9_000, "batch": 3},
        drawn=True,
    ),
    "weight-tour": StudyCase(full=("random:gpt2",), drawn=True, random=frozenset({("weight-histogram", "p")})),
    "token-similarity": StudyCase(
        full=("random:gpt2",),
        texts=lambda: stimuli("token_similarity/her.txt"),
        options={"target": " her"},
        drawn=True,
        random=_random(distributions=("random",)),
    ),
    "qkv-activations": StudyCase(
        full=("random:gpt2-medium",),
        texts=lambda: [alice()],
        options={"target": " like", "context": 50, "rows": 64, "permutations": 1000},
        small={"context": 13, "rows": 7, "permutations": 40},
        random=_random(_3b=("low", "high")),
    ),
    "adjustment-magnitudes": StudyCase(
        full=("random:gpt2-large",),
        texts=passages,
        corpus=True,
        options={"batch": 64, "positions": 30},
        small={"batch": 19, "positions": 11},
    ),
    "prediction-divergence": StudyCase(
        quick=("demo-gpt2",),  # random weights predict no token of a text
        full=("demo-gpt2",),
        texts=lambda: [alice()],
        options={"permutations": 1000},
        small={"permutations": 40, "length": 97},
        random=_random(_5=("null", "p", "counts", "edges"), _6=BY_CHANCE),
    ),
    "category-selectivity": StudyCase(
        full=("random:gpt2-large",),
        figures=("1", "2a", "2b", "3a", "3b", "4", "5", "6a"),
        texts=lambda: stimuli("category_selectivity/words.txt"),
        options={"permutations": 1000},
        small={"permutations": 40},
        random=_random(_4=("low", "high"), _6a=("p", "q_value")),
    ),
    "head-silencing": StudyCase(
        full=("random:gpt2-medium",),
        figures=("2", "3", "4a", "4b", "5a", "5b"),
        options={"text": stimuli("head_silencing/music.txt")[0]},
    ),
    "head-patching": StudyCase(
        full=("random:gpt2-medium",),
        figures=("1", "2", "3a", "3b", "4", "5"),
        options={
            "clean": "When John and Mary went to the house, Mary gave a book to",
            "donor": "When John and Mary went to the house, John gave a book to",
            "answers": [" John", " Mary"],
        },
        random=_random(_2=("delta",)),
    ),
}


def inputs(study: str, folder: Path, small: bool, corpus: list[str] | None = None) -> tuple[list[str], dict[str, Any]]:
    """Writes the texts of a study to a folder, and returns the command's words and the baselines' job.

    Args:
      study: its name.
      folder: of the files.
      small: whether to use the small options.
      corpus: of a study that counts one; python-docs unless given.
    """
    case = STUDIES[study]
    settings, texts = case.settings(small), case.texts()
    words, job = [], {**settings, "texts": texts}
    if case.counted:
        documents = open_corpus(corpus or PYTHON_DOCS)
        path = write_corpus(folder / "corpus.jsonl", documents, settings["tokens"])
        words, job["corpus"] = ["--corpus", str(path), "--no-cache"], str(path)
    elif case.corpus:
        path = folder / f"{study}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        words, job["texts"] = ["--corpus", str(path)], texts[: settings["batch"]]
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words, job


def write_corpus(path: Path, documents: Iterable[str], tokens: int) -> Path:
    """Writes documents as a .jsonl file with text for so many tokens, repeated if there is less."""
    characters = 0
    with path.open("w") as file:
        while characters < CHARACTERS * tokens:
            before = characters
            for text in documents:
                file.write(json.dumps({"text": text}) + "\n")
                characters += len(text)
                if characters >= CHARACTERS * tokens:
                    break
            if characters == before:
                raise BenchmarkError("the corpus has no text")
    return path
