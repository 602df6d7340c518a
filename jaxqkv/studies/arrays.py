"""Names and axes of a figure's arrays, as the figure's definition gives them.

    edges [edge], mean, std [layer, qkv]; with --significance: p, q_value [layer]

Names before one pair of brackets have the same axes, and `[]` is a single number. Capitals in a name stand for a part
that differs: `NAME` for a checkpoint's name, `LAYER` for a layer's number, others for values that are given after a
semicolon, as in `counts_MATRIX [bin]; MATRIX: q, k, v`. Arrays after another semicolon and a condition are saved in
that case only; `*_NAME` there repeats all arrays before it with a name at the end.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

_GROUP = re.compile(r"(\w+(?:, \w+)*) \[([^\[\]]*)\](?:, |$)")
_VARIABLE = re.compile("[A-Z]{2,}")
_NUMBER = "LAYER"
_AGAIN = "*_NAME"


class Declared(NamedTuple):
    """One array of a figure, or several whose names have a part that differs.

    Attributes:
      name: in the .npz file; capitals stand for any text, `LAYER` for a number.
      axes: names of its axes.
      condition: in which case it is saved; empty if always.
      family: name in the definition, with the capitals of listed values too.
      member: the listed values that this name has in their place.
    """

    name: str
    axes: tuple[str, ...]
    condition: str
    family: str
    member: tuple[str, ...]

    def match(self, name: str) -> tuple[str, ...] | None:
        """Returns what the capitals of the family stand for in an array's name; None for the name of another array."""
        parts = _VARIABLE.split(self.name)
        variables = [r"(\d+)" if each == _NUMBER else "(.+)" for each in _VARIABLE.findall(self.name)]
        whole = "".join(itertools.chain(*itertools.zip_longest(map(re.escape, parts), variables, fillvalue="")))
        found = re.fullmatch(whole, name)
        return None if found is None else self.member + found.groups()


@dataclasses.dataclass(frozen=True)
class FigureArrays:
    """The arrays of a figure.

    Attributes:
      text: names and axes, as above.

    Raises:
      ValueError: for a text of another form.
    """

    text: str

    def __post_init__(self) -> None:
        if not self.declared:
            raise self._unread(self.text)

    def __str__(self) -> str:
        return self.text

    @functools.cached_property
    def declared(self) -> tuple[Declared, ...]:
        """The arrays in the order of the text."""
        always, *more = self.text.split("; ")
        parts, values = [("", always)], {}
        for each in more:
            head, colon, rest = each.partition(": ")
            if not colon:
                raise self._unread(each)
            if _VARIABLE.fullmatch(head):
                values[head] = rest.split(", ")
            else:
                parts.append((head, rest))
        found: list[Declared] = []
        for condition, text in parts:
            groups = [(each.family, each.axes) for each in found] if text == _AGAIN else list(self._groups(text))
            end = "_NAME" if text == _AGAIN else ""
            for family, axes in dict(groups).items():
                name = family + end
                found += [Declared(each, axes, condition, name, member) for each, member in _members(name, values)]
        return tuple(found)

    def _groups(self, text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yields each name with its axes."""
        place = 0
        while place < len(text):
            group = _GROUP.match(text, place)
            if group is None:
                raise self._unread(text[place:])
            names, axes = group.groups()
            for name in names.split(", "):
                yield name, tuple(filter(None, axes.split(", ")))
            place = group.end()

    def _unread(self, part: str) -> ValueError:
        form = "x, y [layer], z []; with --option: p [layer]"
        return ValueError(f"arrays {self.text!r}: the form is {form!r}, which {part!r} is not")

    def find(self, name: str) -> Declared | None:
        """Returns the declaration of an array; of several, the one whose capitals stand for least; None without any."""
        found = {each: parts for each in self.declared if (parts := each.match(name)) is not None}
        return min(found, key=lambda each: sum(map(len, found[each])), default=None)

    def axes(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Returns the axes of the arrays of these names, without those that are not declared."""
        return {name: found.axes for name in names if (found := self.find(name)) is not None}


def _members(name: str, values: Mapping[str, list[str]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields a name for each choice of the values of the capitals in it, and that choice."""
    variables = [each for each in _VARIABLE.findall(name) if each in values]
    for member in itertools.product(*(values[each] for each in variables)):
        whole = name
        for variable, value in zip(variables, member, strict=True):
            whole = whole.replace(variable, value, 1)
        yield whole, member
