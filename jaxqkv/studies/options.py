"""The options of the studies, as fields of frozen dataclasses.

From the fields are derived the arguments of `jaxqkv figures STUDY`, the keywords of a call from Python, and the
checks of both. A study's options are a dataclass that inherits the groups it needs. Nothing here imports JAX or
NumPy, so that help is printed at once.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxqkv.errors import JaxqkvError, nearest
from jaxqkv.figures.style import THEMES

_METADATA = "option"


def _nothing(value: Any) -> bool:
    """Accepts no object as it is."""
    return False


@dataclasses.dataclass(frozen=True)
class Option:
    """A field's meaning, beside its name, type and default.

    Attributes:
      help: its effect.
      parse: word of the command line → value; a ValueError says what it takes.
      metavar: what stands for the value in the help.
      choices: the words that it takes, if it takes only some.
      several: takes one or more values, as a tuple.
      repeated: a second value needs the option's name again.
      accepts: tells a Python object that is a value as it is, such as an open checkpoint.
      command_only: has no meaning in a call from Python.
      shown: the default as the help shows it, where that is not how the value is printed.
    """

    help: str
    parse: Callable[[str], Any] = str
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    several: bool = False
    repeated: bool = False
    accepts: Callable[[Any], bool] = _nothing
    command_only: bool = False
    shown: str | None = None


def option(default: Any, help: str, **about: Any) -> Any:
    """Returns a dataclass field with this default; `about` as for `Option`."""
    return dataclasses.field(default=default, metadata={_METADATA: Option(help, **about)})


def options_of(kind: type) -> dict[str, tuple[Option, Any]]:
    """Returns name → (option, default) of a dataclass whose fields are made by `option`."""
    return {field.name: (field.metadata[_METADATA], field.default) for field in dataclasses.fields(kind)}


# --- words and values ---


def whole_number(smallest: int | None = None, largest: int | None = None) -> Callable[[str], int]:
    """Returns a `parse` for a whole number in a range."""

    def parse(text: str) -> int:
        limits = "" if smallest is None else f" from {smallest} " + ("up" if largest is None else f"to {largest}")
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"{text} is not a whole number{limits}") from None
        if (smallest is not None and value < smallest) or (largest is not None and value > largest):
            raise ValueError(f"{value} is not a whole number{limits}")
        return value

    return parse


def device_count(text: str) -> int | str:
    """Parses how many devices: a number from 1 up, or `all`."""
    return text if text == "all" else whole_number(1)(text)


def mesh_axes(text: str) -> dict[str, int]:
    """Parses the parts of each axis of a mesh, as data=4,head=2."""
    parts = re.fullmatch(r"(?:(data|head)=([1-9]\d*))(?:,(data|head)=([1-9]\d*))?", text)
    if not parts or parts[1] == parts[3]:
        raise ValueError(f"{text} is not like data=4,head=2")
    return {"data": 1} | {name: int(size) for name, size in (parts.group(1, 2), parts.group(3, 4)) if name}


Kind = TypeVar("Kind")


def from_keywords(kind: type[Kind], given: Mapping[str, Any], owner: str) -> Kind:
    """Returns the options of a call from Python, checked as the command checks its arguments.

    Args:
      kind: the dataclass.
      given: values by name; None is as if it were not there.
      owner: whose options they are, for error messages.

    Raises:
      JaxqkvError: naming the option, and what it takes.
    """
    known = {name: each for name, (each, _) in options_of(kind).items() if not each.command_only}
    values = {}
    for name, value in given.items():
        if name not in known:
            raise JaxqkvError(f"{owner} takes no option {name}; {nearest(name, known)}")
        if value is not None:
            default = options_of(kind)[name][1]
            values[name] = _checked(name, value, known[name], is_flag=default is False)
    return kind(**values)


def _checked(name: str, value: Any, about: Option, is_flag: bool) -> Any:
    if is_flag:
        if not isinstance(value, bool):
            raise JaxqkvError(f"{name} is True or False, not {value!r}")
        return value
    if not about.several:
        return _one(name, value, about)
    try:
        many = [value] if isinstance(value, str | os.PathLike) or about.accepts(value) else list(value)
    except TypeError:
        raise _unfit(name, value) from None
    if not many:
        raise JaxqkvError(f"{name} is empty")
    return tuple(_one(name, each, about) for each in many)


def _one(name: str, value: Any, about: Option) -> Any:
    if about.accepts(value):
        return value
    if isinstance(value, Mapping):  # the axes of a mesh
        value = ",".join(f"{key}={size}" for key, size in value.items())
    try:
        word = os.fspath(value) if about.parse is str else str(value)
    except TypeError:
        raise _unfit(name, value) from None
    try:
        parsed = about.parse(word)
    except ValueError as error:
        raise JaxqkvError(f"{name}: {error}") from None
    if about.choices and parsed not in about.choices:
        raise JaxqkvError(f"{name} is one of {', '.join(about.choices)}, not {value!r}")
    return parsed


def _unfit(name: str, value: Any) -> JaxqkvError:
    return JaxqkvError(f"{name} cannot be {value!r}; `jaxqkv figures STUDY --help` says what it takes")


# --- groups that studies share ---

# Options that mean the same thing in two ways.
EXCLUSIVE = (("demo", "model"), ("text", "text_file"), ("devices", "mesh"))


def is_open(value: Any) -> bool:
    """Tells an open checkpoint or model from the name of one."""
    return hasattr(value, "config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Which checkpoint and layer are drawn, and how; options of every study."""

    model: tuple[Any, ...] = option(
        (),
        "checkpoint to draw: hub id, folder, demo-gpt2, demo-bert or random:SPEC (default the study's own)",
        metavar="SPEC",
        several=True,
        accepts=is_open,
    )
    demo: bool = option(False, "draw the bundled checkpoint that fits the study; no download")
    revision: str | None = option(None, "branch, tag or commit on the hub", metavar="NAME")
    layer: int | None = option(None, "layer to draw (default the study's own)", parse=whole_number(), metavar="LAYER")
    seed: int = option(0, "seed of everything random, fresh weights too", parse=whole_number(0), metavar="N")
    theme: str = option("light", "colours of the pictures", choices=THEMES)
    dpi: int = option(200, "resolution of the pictures", parse=whole_number(10, 2400), metavar="N")

    def __post_init__(self) -> None:
        for names in EXCLUSIVE:
            given = [name for name in names if getattr(self, name, None) not in (None, False, ())]
            if len(given) > 1:
                raise JaxqkvError(" and ".join(f"--{name.replace('_', '-')}" for name in given) + " exclude each other")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Checkpoints beside the first."""

    compare: tuple[Any, ...] = option(
        (),
        "further checkpoints, overlaid or beside; NAME@REVISION on the hub",
        metavar="SPEC",
        several=True,
        accepts=is_open,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
    """How the model runs and what it reads text with; for studies of activations."""

    tokenizer: Path | None = option(
        None, "take the tokenizer from this folder instead of the checkpoint's", parse=Path, metavar="FOLDER"
    )
    dtype: str = option(
        "float32", "the model's arithmetic; statistics are always float32", choices=("float32", "bfloat16")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts instead of the study's own."""

    text: tuple[str, ...] = option(
        (), "texts instead of the study's own; several make a batch", metavar="TEXT", several=True
    )
    text_file: tuple[Path, ...] = option(
        (), "the same, each read from a file", parse=Path, metavar="FILE", several=True
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairOfTexts:
    """Two texts and two answers."""

    clean: str | None = option(None, "text whose next token is asked for, instead of the study's own", metavar="TEXT")
    donor: str | None = option(None, "text of as many tokens with the other answer", metavar="TEXT")
    answers: tuple[str, ...] = option(
        (), "the two answers, a token each, with their leading spaces", metavar="WORD", several=True
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents:
    """Documents of a corpus."""

    corpus: tuple[str, ...] = option(
        (),
        "hub data set NAME[:CONFIG[:SPLIT]], python-docs, or files or folders of .txt, .jsonl and .parquet "
        "(give --corpus once for each)",
        metavar="SPEC",
        several=True,
        repeated=True,
    )
    documents: str = option("files", "what one document of a .txt file is", choices=("files", "paragraphs"))
    text_column: str = option("text", "field or column that holds the text", metavar="NAME")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resampling:
    """Tests by permutation and intervals by bootstrap."""

    permutations: int = option(
        1000, "random permutations of a test, and resamples of an interval", parse=whole_number(1), metavar="N"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Significance(Resampling):
    """Tests that the original does not have."""

    significance: bool = option(
        False, "test what the original compares by eye: p and q are saved, and q < 0.05 is marked"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """Several devices of this machine."""

    devices: int | str | None = option(
        None, "devices that share the batch (default one)", parse=device_count, metavar="N|all"
    )
    mesh: Mapping[str, int] | None = option(
        None,
        "data=N,head=M: N parts of the batch, each on M devices that share the heads",
        parse=mesh_axes,
        metavar="AXES",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Several processes of one job."""

    distributed: bool = option(False, "join a job of several processes; the first one draws", command_only=True)
    coordinator: str | None = option(
        None,
        "address of the first process, where SLURM or MPI do not say it",
        metavar="HOST:PORT",
        command_only=True,
    )
    processes: int | None = option(None, "number of processes", parse=whole_number(1), metavar="N", command_only=True)
    process: int | None = option(
        None, "which process this is, from 0", parse=whole_number(0), metavar="I", command_only=True
    )
    patience: int = option(
        60, "seconds to wait for the others", parse=whole_number(1), metavar="SECONDS", command_only=True
    )
