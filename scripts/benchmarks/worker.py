"""One side of a case in a process of its own: `python -m benchmarks.worker SIDE SPEC [FILE]`.

With a file it computes once, writes the result there and ends. Else it computes for every line that
it reads, and answers with a line of JSON: seconds, and bytes of device memory. A line may name a file
for the result. The first line is one run; for a later one short runs are repeated, and the median counts.
"""

import json
import statistics
import sys
import time

import numpy as np

from benchmarks.cases import work
from benchmarks.sides import choose_precision

# Seconds that short runs are repeated for, so that cold caches and sleeping threads of the first ones do not count.
WINDOW = 0.25


def main(side: str, spec: str, once: str | None = None) -> None:
    settings = json.loads(spec)
    choose_precision(side, settings.get("tf32", False))
    case = work(side, settings)
    if not once:
        print(json.dumps("ready"), flush=True)
    for number, line in enumerate([once] if once else sys.stdin):
        path = line.strip()
        seconds: list[float] = []
        while not seconds or (number > 0 and sum(seconds) < WINDOW):
            value = None  # so that the last result's memory is free
            start = time.perf_counter()
            value = case.run()
            seconds.append(time.perf_counter() - start)
        device_bytes = case.device_peak()
        if path:
            np.save(path, case.result(value))
        del value
        if number == 0 and not once:
            case.settle()
        case.forget_peak()  # of the comparison and the choice
        print(json.dumps({"seconds": statistics.median(seconds), "device bytes": device_bytes}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
