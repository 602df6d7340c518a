"""One side of a case in a process of its own: `python -m benchmarks.worker SIDE SPEC [FILE]`.

With a file it computes once, writes the result there and ends. Else it computes once for every line
that it reads, and answers with a line of JSON: seconds, and bytes of device memory. A line may name
a file for the result.
"""

import json
import sys
import time

import numpy as np

from benchmarks.cases import work
from benchmarks.sides import choose_precision


def main(side: str, spec: str, once: str | None = None) -> None:
    settings = json.loads(spec)
    choose_precision(side, settings.get("tf32", False))
    case = work(side, settings)
    if not once:
        print(json.dumps("ready"), flush=True)
    for number, line in enumerate([once] if once else sys.stdin):
        path = line.strip()
        start = time.perf_counter()
        value = case.run()
        seconds, device_bytes = time.perf_counter() - start, case.device_peak()
        if path:
            np.save(path, case.result(value))
        del value
        if number == 0 and not once:
            case.settle()
        case.forget_peak()  # of the comparison and the choice
        print(json.dumps({"seconds": seconds, "device bytes": device_bytes}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
