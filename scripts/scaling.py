"""Estimates a run over all of English Wikipedia on 1, 8 and 64 devices from pieces measured on this machine.

    python scripts/scaling.py --model random:bert-large-uncased --tokenizer FOLDER --corpus FILE

Measured are the model on a part of a batch, the tokenizer, the bins of pairs, and the bytes of each;
everything else is assumed, and printed as such.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from benchmark import about_machine
from benchmarks.report import duration, write_readme

import jaxqkv
from jaxqkv.runtime.files import replacing
from jaxqkv.studies.token_frequency import TokenFrequencyOptions
from jaxqkv.studies.token_frequency.reductions import ADJUSTMENT, BINNED, binned_pairs, reducer
from jaxqkv.text.corpora import PYTHON_DOCS, open_corpus

README = Path(__file__).with_name("README.md")
PUBLISHED = README.with_name("scaling.json")
MARK = "scaling"
DEVICES = (1, 8, 64)
# The data set's card: wikimedia/wikipedia, 20231101.en.
ARTICLES, TEXT_BYTES, DOWNLOAD_BYTES = 6_407_814, 20.2e9, 11.7e9
# Assumed: the share of articles with as many tokens as a sequence; what a machine has; bytes a second.
LONG_SHARE, DEVICES_A_MACHINE, NETWORK = 0.35, 8, 100e6


def measure(model: jaxqkv.Model, corpus: Any, sequences: int, repeat: int) -> dict[str, float]:
    """Returns seconds and bytes of each piece, per sequence or per byte of text."""
    config, tokenizer = model.config, model.tokenizer
    texts = list(corpus)
    size = sum(len(text.encode()) for text in texts)
    rows = tokenizer.encode(texts, special_tokens=False)
    tokens = sum(map(len, rows))
    tokenising = _median(lambda: tokenizer.encode(texts, special_tokens=False), repeat)
    stream = np.concatenate([np.array(row, np.int32) for row in rows])
    ids = np.resize(stream, (sequences, config.n_positions))
    counts = np.bincount(stream, minlength=config.vocab_size)
    log_frequency = np.log(np.maximum(counts, 1) / counts.sum())[ids]
    binning = _median(lambda: binned_pairs(log_frequency), repeat) / sequences
    _, index = binned_pairs(log_frequency)
    reduce = reducer((ADJUSTMENT, BINNED), model.mesh)

    def run() -> Any:
        return jax.block_until_ready(model.run(ids, reduce=reduce, inputs=index, memory=TokenFrequencyOptions.memory))

    start = time.perf_counter()
    results = run()
    first = time.perf_counter() - start
    run()  # keeps the weights
    running = _median(run, repeat)
    return {
        "seconds a sequence": running / sequences,
        "seconds until the first": max(first - running, 0),
        "seconds a byte of text": tokenising / size,
        "seconds of bins a sequence": binning,
        "bytes a token": size / tokens,
        "bytes to the device a sequence": (ids.nbytes + index.nbytes) / sequences,
        "bytes from the device a sequence": sum(leaf.nbytes for leaf in jax.tree.leaves(results)) / sequences,
        "bytes of weights": model.weights.nbytes,
    }


def _median(function: Callable[[], Any], repeat: int) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def predict(pieces: dict[str, float], devices: int) -> dict[str, float]:
    """Returns seconds of each piece for the whole corpus, and of the whole, in which pieces run at the same time."""
    machines = -(-devices // DEVICES_A_MACHINE)
    sequences = ARTICLES * LONG_SHARE
    parts = {
        "model": sequences * pieces["seconds a sequence"] / devices,
        "tokenizer and bins": (
            TEXT_BYTES * pieces["seconds a byte of text"] + sequences * pieces["seconds of bins a sequence"]
        ) / machines,
        "download": DOWNLOAD_BYTES / NETWORK / machines,
    }  # fmt: skip
    return parts | {"whole": pieces["seconds until the first"] + max(parts.values())}


def markdown(measured: dict[str, Any]) -> str:
    """Returns the paragraph and the table for scripts/README.md."""
    pieces = measured["pieces"]
    columns = ("model", "tokenizer and bins", "download", "whole")
    lines = [f"| devices | machines | {' | '.join(columns)} |", "|---:" * 6 + "|"]
    for devices in DEVICES:
        parts = predict(pieces, devices)
        times = " | ".join(duration(parts[name]) for name in columns)
        lines.append(f"| {devices} | {-(-devices // DEVICES_A_MACHINE)} | {times} |")
    to, back = (pieces[f"bytes {way} the device a sequence"] / 1e3 for way in ("to", "from"))
    return (
        f"Measured on {measured['processor']}, {measured['cores']} cores, {measured['device']}, {measured['model']} in "
        f"float32: {pieces['seconds a sequence']:.2f} s a sequence of {measured['length']} tokens, "
        f"{pieces['seconds a byte of text'] * 1e9:.0f} s a gigabyte of text tokenised, "
        f"{1e3 * pieces['seconds of bins a sequence']:.0f} ms of bins a sequence; {to:,.0f} kB go to the device a "
        f"sequence, {back:,.0f} kB come back.\n\n" + "\n".join(lines)
    )


def chart(measured: dict[str, Any], path: Path) -> None:
    """Draws the pieces' times by number of devices."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    grid = 2.0 ** np.arange(0, 8)
    predicted = [predict(measured["pieces"], int(n)) for n in grid]
    styles = {"model": "#4a78c9", "tokenizer and bins": "#e08a1e", "download": "#8e9aaf"}
    for name, color in styles.items():
        axes.plot(grid, [each[name] / 3600 for each in predicted], color=color, label=name)
    whole = [predict(measured["pieces"], n)["whole"] / 3600 for n in DEVICES]
    axes.plot(DEVICES, whole, "o", color="0.2", label="whole")
    for devices, hours in zip(DEVICES, whole, strict=True):
        axes.annotate(duration(3600 * hours), (devices, hours), xytext=(6, 6), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="devices", ylabel="hours", title="All of English Wikipedia")
    axes.set_xticks(grid, [f"{n:g}" for n in grid])
    axes.set_xticks([], minor=True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="random:bert-large-uncased", metavar="SPEC")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="tokenizer folder (default the checkpoint's)")
    parser.add_argument("--corpus", default=PYTHON_DOCS, metavar="SPEC", help="text to tokenise (default %(default)s)")
    parser.add_argument("--sequences", type=int, default=8, help="sequences run together (default %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each piece (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmark"), help="folder to write to (default %(default)s)")
    parser.add_argument("--publish", action="store_true", help="write picture and numbers to scripts/README.md too")
    options = parser.parse_args()
    try:
        model = jaxqkv.load(options.model, tokenizer=options.tokenizer)
        pieces = measure(model, open_corpus(options.corpus), options.sequences, options.repeat)
    except jaxqkv.JaxqkvError as error:
        print(f"scaling: error: {error}", file=sys.stderr)
        return 2
    device = jax.devices()[0]
    measured = about_machine() | {
        "device": f"{device.platform}: {device.device_kind}",
        "model": model.checkpoint.name,
        "length": model.config.n_positions,
        "pieces": pieces,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    with replacing(options.out / "scaling.json") as file:
        file.write(json.dumps(measured, indent=1).encode())
    chart(measured, options.out / "scaling.png")
    print(markdown(measured))
    if options.publish:
        for name in ("scaling.json", "scaling.png"):
            shutil.copy(options.out / name, PUBLISHED.with_name(name))
        write_readme(README, MARK, markdown(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
