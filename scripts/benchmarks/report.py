"""The benchmark's results as a table for the terminal, one for scripts/README.md, and a chart."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import SCRIPTS, SIDES
from jaxqkv.figures.tables import Table
from jaxqkv.runtime.files import replacing

Result = dict[str, Any]
README = SCRIPTS / "README.md"
# The published numbers of a processor, and those of an accelerator.
PUBLISHED = {"cpu": SCRIPTS / "benchmark.json", "gpu": SCRIPTS / "benchmark-gpu.json"}


def duration(seconds: float) -> str:
    """Returns a duration with its unit, in two or three digits."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 10 * size or (size > 60 and seconds >= 2 * size):
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s" if seconds >= 10 else f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:,.1f} ms"


def _memory(result: Result, side: str) -> int | None:
    """Returns the peak of the accelerator's memory where it was measured, and else of anonymous memory."""
    return result.get("device memory", result["memory"]).get(side)


def _part(result: Result, side: str) -> float:
    """Returns jaxqkv's memory as a share of a baseline's; NaN where one is unknown."""
    ours, theirs = _memory(result, "jaxqkv"), _memory(result, side)
    return ours / theirs if ours and theirs else np.nan


def _row(result: Result) -> dict[str, str]:
    """Returns the cells of a case by their column; baselines that were left out have none."""
    median, cold = result["median seconds"], result["cold seconds"]
    peers = [side for side in SIDES[1:] if side in median]
    differences = [each for each in result["difference"].values() if each is not None]
    # A case so long that only its first run is timed.
    cold_only = median["jaxqkv"] == cold["jaxqkv"]
    ours = _memory(result, "jaxqkv")
    parts = {side: _part(result, side) for side in peers}
    return {
        "case": result["case"] + " (cold)" * cold_only,
        **{side: duration(median[side]) for side in ("jaxqkv", *peers)},
        **{f"× {side}": f"{result['faster'][side]:.2f}" for side in peers},
        **{f"cold × {side}": f"{cold[side] / cold['jaxqkv']:.2f}" for side in peers},
        "memory": f"{ours / 1e6:,.0f} MB" if ours else "",
        **{f"of {side}": "" if np.isnan(part) else f"{part:.2f}" for side, part in parts.items()},
        "difference": f"{max(differences):.0e}" if differences else "",
        "GFLOP/s": f"{result['GFLOP/s']:,.0f}" if "GFLOP/s" in result else "",
        "of peak": f"{result['of peak']:.0%}" if "of peak" in result else "",
        "GB/s": f"{result['GB/s']:.1f}" if "GB/s" in result else "",
    }


HEADING = (
    "case", *SIDES, *(f"{words} {side}" for words in ("×", "cold ×") for side in SIDES[1:]), "memory",
    *(f"of {side}" for side in SIDES[1:]), "difference", "GFLOP/s", "of peak", "GB/s",
)  # fmt: skip


def _table(results: Sequence[Result], left_out: Sequence[str] = ()) -> Table:
    """Returns the columns that any of the cases has."""
    cells = [_row(each) for each in results]
    heading = [name for name in HEADING if name not in left_out and any(name in row for row in cells)]
    return Table(heading=heading, rows=[[row.get(name, "") for name in heading] for row in cells])


def table(results: Sequence[Result]) -> str:
    """Returns the table for a terminal."""
    return _table(results).text()


def markdown(measured: dict[str, Any]) -> str:
    """Returns the text for scripts/README.md: the machine in a sentence, and a row for each case."""
    cells = _table(measured["cases"], left_out=("GFLOP/s", "GB/s"))
    lines = [f"| {' | '.join(cells.heading)} |", "|---|" + "---:|" * (len(cells.heading) - 1)]
    lines += [f"| {' | '.join(row)} |" for row in cells.rows]
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    peak = _peak(measured["cases"], None)
    where = f"{measured['processor']}, {measured['cores']} cores"
    if measured["device"].startswith("cpu"):
        where += f", {measured['memory GB']:.0f} GB of memory, with {peak:,.0f} GFLOP/s of float32 products"
    else:
        products = [f"{peak / 1e3:,.1f} TFLOP/s of float32 products"]
        if (tf32 := _peak(measured["cases"], "TF32")) is not None:
            products.append(f"{tf32 / 1e3:,.0f} of TF32")
        where = f"{measured['device'].split(': ')[-1]}, with {' and '.join(products)}; {where}"
    return f"On {where} ({versions}):\n\n" + "\n".join(lines)


def _peak(results: Sequence[Result], precision: str | None) -> float | None:
    """Returns the median of the machine's GFLOP/s in products of a precision; None where none was measured."""
    peaks = [each["peak GFLOP/s"] for each in results if "peak GFLOP/s" in each and each.get("precision") == precision]
    return float(np.median(peaks)) if peaks else None


def tables() -> dict[str, str]:
    """Returns the text of each place in scripts/README.md for published numbers, by its mark."""
    measured = {mark: PUBLISHED[kind] for mark, kind in (("benchmark", "cpu"), ("benchmark on an accelerator", "gpu"))}
    return {
        mark: markdown(json.loads(path.read_text())) if path.exists() else "No accelerator has been measured yet."
        for mark, path in measured.items()
    }


def publish(measured: Path) -> None:
    """Keeps numbers as the published ones of their kind of device, and puts them into scripts/README.md."""
    device = json.loads(measured.read_text())["device"]
    shutil.copy(measured, PUBLISHED["cpu" if device.startswith("cpu") else "gpu"])
    for mark, content in tables().items():
        write_readme(README, mark, content)


def write_readme(path: Path, mark: str, content: str) -> None:
    """Puts generated text between its marks, `<!-- MARK -->` and `<!-- end of MARK -->`."""
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    changed, count = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{path} has no place for what is generated: {begin} … {end}")
    with replacing(path) as file:
        file.write(changed.encode())


def chart(results: Sequence[Result], path: Path) -> None:
    """Draws how many times faster jaxqkv is than each baseline, and its share of their memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.4 + 0.42 * len(results)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = np.arange(len(results))
    for shift, side, color in ((-0.2, "notebook", "#4a78c9"), (0.2, "tuned", "#e08a1e")):
        if any(side not in each["faster"] for each in results):
            continue
        options = {"height": 0.38, "color": color}
        left.barh(places + shift, [each["faster"][side] for each in results], label=f"than {side}", **options)
        cold = [each["cold seconds"][side] / each["cold seconds"]["jaxqkv"] for each in results]
        left.plot(cold, places + shift, "|", color="0.2", markersize=9)
        share = [_part(each, side) for each in results]
        right.barh(places + shift, share, **options)
    left.plot([], [], "|", color="0.2", markersize=9, label="the first time")
    left.set(yticks=places, yticklabels=[each["case"] for each in results], xscale="log", xlabel="times faster")
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if left.get_xlim()[0] <= tick <= left.get_xlim()[1]]
    left.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    left.set_xticks([], minor=True)
    left.set_ylim(len(results) - 0.4, -0.6)
    right.set(xlabel="part of the baseline's memory", xlim=(0, None))
    for ax in (left, right):
        ax.axvline(1, color="0.3", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)
