"""The benchmark's results as a table for the terminal, one for scripts/README.md, and a chart."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import SIDES
from jaxqkv.figures.tables import Table
from jaxqkv.runtime.files import replacing

Result = dict[str, Any]


def duration(seconds: float) -> str:
    """Returns a duration with its unit, in two or three digits."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 10 * size or (size > 60 and seconds >= 2 * size):
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s" if seconds >= 10 else f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:,.1f} ms"


def _row(result: Result) -> tuple[str, ...]:
    median, cold, memory = result["median seconds"], result["cold seconds"], result["memory"]
    differences = [each for each in result["difference"].values() if each is not None]
    # A case so long that only its first run is timed.
    cold_only = median["jaxqkv"] == cold["jaxqkv"]
    return (
        result["case"] + " (cold)" * cold_only,
        *(duration(median[side]) for side in SIDES),
        *(f"{result['faster'][side]:.2f}" for side in SIDES[1:]),
        *(f"{cold[side] / cold['jaxqkv']:.2f}" for side in SIDES[1:]),
        f"{memory['jaxqkv'] / 1e6:,.0f} MB" if memory["jaxqkv"] else "",
        *(f"{memory['jaxqkv'] / memory[side]:.2f}" if memory["jaxqkv"] and memory[side] else "" for side in SIDES[1:]),
        f"{max(differences):.0e}" if differences else "",
        f"{result['GFLOP/s']:,.0f}" if "GFLOP/s" in result else "",
        f"{result['of peak']:.0%}" if "of peak" in result else "",
        f"{result['GB/s']:.1f}" if "GB/s" in result else "",
    )


HEADING = (
    "case", *SIDES, "× tuned", "× notebook", "cold × tuned", "cold × notebook", "memory", "of tuned", "of notebook",
    "difference", "GFLOP/s", "of peak", "GB/s",
)  # fmt: skip


def table(results: Sequence[Result]) -> str:
    """Returns the table for a terminal."""
    return Table(heading=HEADING, rows=[_row(each) for each in results]).text()


def markdown(measured: dict[str, Any]) -> str:
    """Returns the text for scripts/README.md: the machine in a sentence, and a row for each case."""
    columns = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13)
    heading = [HEADING[column] for column in columns]
    lines = [f"| {' | '.join(heading)} |", "|---|" + "---:|" * (len(heading) - 1)]
    for result in measured["cases"]:
        row = _row(result)
        lines.append(f"| {' | '.join(row[column] for column in columns)} |")
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    peak = np.median([each["peak GFLOP/s"] for each in measured["cases"] if "peak GFLOP/s" in each])
    where = f"{measured['processor']}, {measured['cores']} cores, {measured['memory GB']:.0f} GB of memory"
    if not measured["device"].startswith("cpu"):
        where = f"{measured['device']}; {where}"
    return f"On {where}, with {peak:,.0f} GFLOP/s of float32 products ({versions}):\n\n" + "\n".join(lines)


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
        options = {"height": 0.38, "color": color}
        left.barh(places + shift, [each["faster"][side] for each in results], label=f"than {side}", **options)
        cold = [each["cold seconds"][side] / each["cold seconds"]["jaxqkv"] for each in results]
        left.plot(cold, places + shift, "|", color="0.2", markersize=9)
        memory = [each["memory"] for each in results]
        share = [each["jaxqkv"] / each[side] if each["jaxqkv"] and each[side] else np.nan for each in memory]
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
