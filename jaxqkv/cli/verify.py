"""`jaxqkv verify`: compares every intermediate of a checkpoint, and token ids, with PyTorch's."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxqkv.cli.output import about_run, show
from jaxqkv.cli.parser import Line, Output, Parser, Precision, add_checkpoint, add_options, made
from jaxqkv.studies.options import option

if TYPE_CHECKING:
    from jaxqkv.figures.tables import Table

EXAMPLES = """example:
  jaxqkv verify demo-gpt2

A tensor passes if its difference from PyTorch in float64 is within the tolerance, or within 5 times PyTorch's own error
in float32, and float64 agrees. The exit status is 0 if all pass, 1 if one does not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Comparison."""

    text: tuple[str, ...] = option((), "texts to run (default two of the studies')", metavar="TEXT", several=True)
    dtype: str = option("float32", "dtype of jaxqkv's arithmetic", choices=("float32", "bfloat16"))
    out: Path = option(Path("verify.json"), "file to write the report to", parse=Path, metavar="FILE")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parses the words after `verify`."""
    parser = Parser(prog="jaxqkv verify", description="Compare every intermediate with PyTorch's.", epilog=EXAMPLES)
    add_checkpoint(parser)
    for group in (VerifyOptions, Precision, Output):
        add_options(parser, group)
    return parser.parse_all(words, "; quote a text of several words")


def run(given: argparse.Namespace, line: Line) -> int:
    """Writes the report and prints the worst layer of each tensor."""
    from jaxqkv.architectures import open_checkpoint
    from jaxqkv.model import comparison
    from jaxqkv.runtime.files import prepare_file
    from jaxqkv.studies.stimuli import stimuli

    options = made(VerifyOptions, given)
    checkpoint = open_checkpoint(given.spec, revision=given.revision)
    prepare_file(options.out)
    purple, her = (stimuli(name) for name in ("attention_scores/purple.txt", "token_similarity/her.txt"))
    own_texts = [purple[0], her[0], *purple[1:], *her[1:]]
    found = comparison.report(checkpoint, options.text or None, options.dtype, own_texts)
    found |= {name: value for name, value in about_run(options, line).items() if name not in found}
    write(found, options.out)
    verdict = "passed" if found["passed"] else "FAILED"
    last = f"{verdict}: {found['checkpoint']['checkpoint']}, {found['batch']}; see {options.out}"
    show(given, found | {"report": str(options.out)}, lambda: f"{table(found).text()}\n{last}")
    return 0 if found["passed"] else 1


def table(report: dict[str, Any]) -> "Table":
    """Returns a table with the worst layer of each tensor."""
    import numpy as np

    from jaxqkv.figures.tables import Table
    from jaxqkv.model.comparison import ONCE

    dtype = report["dtype"]
    heading = ("tensor", "worst layer", f"{dtype} difference", "its error", "PyTorch's error", "in float64", "")
    rows = []
    for name, each in report["tensors"].items():
        worst = [f"{np.max(each[column]):.1e}" for column in ("difference", "error", "torch_error", "double")]
        verdict = "pass" if each["passed"] else "FAIL"
        layer = "" if name in ONCE else str(int(np.argmax(np.array(each["error"]) / np.array(each["limit"]))))
        rows.append((name, layer, *worst, verdict))
    tokens = report["token ids"]
    if tokens["reason"] is not None:
        rows.append(("token ids", "", "not compared", "", "", "", ""))
    else:
        found = f"{len(tokens['different'])} of {tokens['texts']} texts"
        rows.append(("token ids", "", found, "", "", "", "pass" if tokens["passed"] else "FAIL"))
    rows.append(("tolerance", "", f"{report['tolerance']:.0e}", "", "", f"{report['tolerance in float64']:.0e}", ""))
    return Table(heading=heading, rows=rows)


def write(report: dict[str, Any], path: Path) -> None:
    """Writes the report as JSON, whole or not at all."""
    from jaxqkv.runtime.files import replacing, written

    with written(path), replacing(path) as file:
        file.write(json.dumps(report, indent=1).encode())
