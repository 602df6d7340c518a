"""Arguments of the commands: a parser with one-line errors, and arguments derived from dataclasses of options."""

import argparse
import dataclasses
import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeVar

from jaxqkv.errors import JaxqkvError, nearest, printable
from jaxqkv.studies.options import Option, flag, option, options_of

Kind = TypeVar("Kind")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help that keeps line breaks and has room for an option's values on its line."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)


def first_option(words: Sequence[str]) -> str | None:
    """Returns the first word that is an option, without a value; None if there is none."""
    return next((word.split("=")[0] for word in words if word.startswith("--")), None)


class Parser(argparse.ArgumentParser):
    """A parser with one-line errors and status 2. Long options cannot be abbreviated."""

    def __init__(self, **settings: Any):
        settings.setdefault("formatter_class", _Help)
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Ends the process with one line and status 2."""
        see = " See" if message.endswith("?") else "; see"
        self.exit(2, f"jaxqkv: error: {printable(message)}{see} {self.prog} --help\n")

    def parse_all(self, words: Sequence[str], hint: str = "") -> argparse.Namespace:
        """Parses all words; the error about an unknown word ends with `hint`."""
        given, rest = self.parse_known_args(words)
        self.refuse_unknown(rest, "" if any(word.startswith("-") for word in rest) else hint)
        return given

    def refuse_unknown(self, words: Sequence[str], hint: str = "") -> None:
        """Ends the process if there are unknown words; the error ends with `hint` or the nearest option."""
        if not words:
            return
        message = f"unrecognized arguments: {' '.join(words)}{hint}"
        known = [name for name in self._option_string_actions if name.startswith("--")]
        unknown = first_option(words)
        if unknown and not hint and (near := nearest(unknown, known)).startswith("did you mean"):
            message += f"; {near}"
        self.error(message)


def add_options(parser: Parser, kind: type, skip: Sequence[str] = ()) -> None:
    """Adds an argument for each field of a dataclass of options, in a group for each class that it inherits."""
    about = options_of(kind)
    for base in kind.__mro__:
        names = [name for name in vars(base).get("__annotations__", ()) if name in about and name not in skip]
        if names:
            title = (base.__doc__ or "").split(".")[0].split("\n")[0]
            group = parser.add_argument_group(title[0].lower() + title[1:])
            for name in names:
                _add_argument(group, name, *about[name])


def _add_argument(group: Any, name: str, about: Option, default: Any) -> None:
    # No default here: the dataclass has it.
    settings: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
    shown = about.shown or (f"{default:,}" if type(default) is int else str(default))
    if shown != shown.strip():  # the space counts
        shown = f'"{shown}"'
    suffix = "" if default is None or default is False or default == () else f" (default {shown})"
    settings["help"] = f"{about.help}{suffix}".replace("%", "%%")
    if default is False:
        settings["action"] = "store_true"
    else:
        settings |= {"type": _type(about.parse), "metavar": about.metavar}
        if about.choices:
            settings["choices"] = about.choices
        if about.repeated:
            settings["action"] = "append"
        elif about.several:
            settings["nargs"] = "+"
    group.add_argument(flag(name), **settings)


def _type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Wraps `parse` for argparse, so that the words of its error are shown."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def add_checkpoint(parser: Parser) -> None:
    """Adds the arguments of a command about one checkpoint."""
    parser.add_argument("spec", metavar="SPEC", help="hub id, folder, demo-gpt2, demo-bert or random:SPEC")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")


def made(kind: type[Kind], given: argparse.Namespace) -> Kind:
    """Returns the dataclass of options from what was parsed."""
    values = {name: getattr(given, name) for name in options_of(kind) if hasattr(given, name)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


# Short escapes of a shell's `$'…'`.
_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


@dataclasses.dataclass(frozen=True)
class Line:
    """The command line as given: the words before the command, the command, and the words after it."""

    before: tuple[str, ...]
    command: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return shell_line(["jaxqkv", *self.before, self.command, *self.words])


def shell_line(words: Iterable[str]) -> str:
    """Returns the line that a shell reads as these words, in characters that all show."""
    return " ".join(shlex.quote(word) if word.isprintable() else _ansi_quoted(word) for word in words)


def _ansi_quoted(word: str) -> str:
    """Returns `$'…'`, as bash and zsh read it: what does not show is escaped by its number."""

    def escaped(char: str) -> str:
        if char.isprintable():
            return f"\\{char}" if char in "\\'" else char
        code = ord(char)
        if 0xDC80 <= code <= 0xDCFF:  # a byte that is no Unicode, as Python reads it from a command line
            return f"\\{code - 0xDC00:03o}"
        return _ESCAPES.get(char) or (f"\\{code:03o}" if code < 0x80 else f"\\U{code:08x}")

    return f"$'{''.join(map(escaped, word))}'"


# --- options that several commands share ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """Output."""

    quiet: bool = option(False, "print only errors and warnings, and draw no progress bars")
    json: bool = option(False, "print only errors, warnings and the result as one JSON document")
    debug: bool = option(False, "show the traceback of an error")

    def __post_init__(self) -> None:
        if self.quiet and self.json:
            raise JaxqkvError("--quiet and --json exclude each other")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """Precision of the arithmetic."""

    # The names of `runtime.devices.PRECISIONS`, which needs JAX.
    precision: str | None = option(
        None,
        "precision of float32 matrix products; high and default matter on accelerators only, bfloat16 everywhere "
        "(default highest)",
        choices=("highest", "high", "default", "bfloat16"),
    )
