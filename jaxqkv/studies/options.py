"""The options of the studies, as fields of frozen dataclasses.

The arguments of `jaxqkv figures STUDY`, the keywords of a call from Python, and the checks of both are derived from the
fields. A study's options are a dataclass that inherits the groups it needs. Nothing here imports JAX or NumPy, so that
help is printed at once.
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
    """Accepts no Python object as a value."""
    return False


@dataclasses.dataclass(frozen=True)
class Option:
    """The description of an option, besides its name, type and default.

    Attributes:
      help: effect of the option.
      parse: function from a word of the command line to a value; its ValueError says what the option takes.
      metavar: name of the value in the help.
      choices: the words that the option takes, if it takes only some.
      several: whether it takes one or more values, as a tuple.
      repeated: whether each further value needs the option's name again.
      accepts: tells whether a Python object is a value as it is, such as an open checkpoint.
      command_only: whether calls from Python do not have it.
      shown: the default as the help shows it, if not the value itself.
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


def flag(name: str) -> str:
    """Returns an option as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


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
    """Parses a number of devices: from 1 up, or `all`."""
    return text if text == "all" else whole_number(1)(text)


def mesh_axes(text: str) -> dict[str, int]:
    """Parses the number of parts along each axis of a mesh, such as data=4,head=2."""
    parts = re.fullmatch(r"(?:(data|head)=([1-9]\d*))(?:,(data|head)=([1-9]\d*))?", text)
    if not parts or parts[1] == parts[3]:
        raise ValueError(f"{text} is not like data=4,head=2")
    return {"data": 1} | {name: int(size) for name, size in (parts.group(1, 2), parts.group(3, 4)) if name}


Kind = TypeVar("Kind")


def from_keywords(kind: type[Kind], given: Mapping[str, Any], owner: str) -> Kind:
    """Returns the options of a call from Python, checked as the command checks its arguments.

    Args:
      kind: dataclass of the options.
      given: values by name; None means not given.
      owner: name of the study, for error messages.

    Raises:
      JaxqkvError: naming the option and what it takes.
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

# Options that exclude each other.
EXCLUSIVE = (("demo", "model"), ("text", "text_file"), ("devices", "mesh"))


def is_open(value: Any) -> bool:
    """Tells an open checkpoint or model from the name of one."""
    return hasattr(value, "config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every study."""

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
    seed: int = option(0, "seed of all random numbers, fresh weights included", parse=whole_number(0), metavar="N")
    theme: str = option("light", "colours of the pictures", choices=THEMES)
    dpi: int = option(200, "resolution of the pictures", parse=whole_number(10, 2400), metavar="N")

    def __post_init__(self) -> None:
        for names in EXCLUSIVE:
            given = [name for name in names if getattr(self, name, None) not in (None, False, ())]
            if len(given) > 1:
                raise JaxqkvError(" and ".join(map(flag, given)) + " exclude each other")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Checkpoints to compare with the first."""

    compare: tuple[Any, ...] = option(
        (),
        "draw these checkpoints too, overlaid or side by side; NAME@REVISION on the hub",
        metavar="SPEC",
        several=True,
        accepts=is_open,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
    """How the model runs."""

    tokenizer: Path | None = option(
        None, "take the tokenizer from this folder instead of the checkpoint's", parse=Path, metavar="FOLDER"
    )
    dtype: str = option(
        "float32", "dtype of the model's arithmetic; statistics are always float32", choices=("float32", "bfloat16")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts instead of the study's own."""

    text: tuple[str, ...] = option(
        (), "run these texts instead of the study's own; several make a batch", metavar="TEXT", several=True
    )
    text_file: tuple[Path, ...] = option(
        (), "run the texts in these files, one text in each", parse=Path, metavar="FILE", several=True
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairOfTexts:
    """Two texts and two answers."""

    clean: str | None = option(None, "text whose next token is predicted, instead of the study's own", metavar="TEXT")
    donor: str | None = option(None, "text with the same number of tokens and the other answer", metavar="TEXT")
    answers: tuple[str, ...] = option(
        (), "the two answers, single tokens with their leading spaces", metavar="WORD", several=True
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents:
    """Documents of a corpus."""

    corpus: tuple[str, ...] = option(
        (),
        "take documents from a hub data set NAME[:CONFIG[:SPLIT]], python-docs, or files or folders of .txt, .jsonl "
        "and .parquet (repeat --corpus for several)",
        metavar="SPEC",
        several=True,
        repeated=True,
    )
    documents: str = option("files", "documents of a .txt file: the whole file, or its paragraphs",
                            choices=("files", "paragraphs"))  # fmt: skip
    text_column: str = option("text", "field or column with the text", metavar="NAME")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resampling:
    """Permutation tests and bootstrap intervals."""

    permutations: int = option(
        1000, "permutations in a test, and resamples for an interval", parse=whole_number(1), metavar="N"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Significance(Resampling):
    """Tests that the original does not have."""

    significance: bool = option(False, "test what the original compares by eye; save p and q, and mark q < 0.05")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """Several devices of this machine."""

    devices: int | str | None = option(
        None, "number of devices that share the batch (default 1)", parse=device_count, metavar="N|all"
    )
    mesh: Mapping[str, int] | None = option(
        None,
        "split the batch into N parts, each on M devices that share the heads: data=N,head=M",
        parse=mesh_axes,
        metavar="AXES",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Several processes of one job."""

    distributed: bool = option(False, "join a job of several processes; the first one draws", command_only=True)
    coordinator: str | None = option(
        None,
        "address of the first process, if SLURM or MPI do not set it",
        metavar="HOST:PORT",
        command_only=True,
    )
    processes: int | None = option(None, "number of processes", parse=whole_number(1), metavar="N", command_only=True)
    process: int | None = option(
        None, "number of this process, from 0", parse=whole_number(0), metavar="I", command_only=True
    )
    patience: int = option(
        60, "seconds to wait for the other processes", parse=whole_number(1), metavar="S", command_only=True
    )
