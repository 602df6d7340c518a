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


def main(side: str, spec: str, once: str | None = None) -> None:
    case = work(side, json.loads(spec))
    if not once:
        print(json.dumps("ready"), flush=True)
    for number, line in enumerate([once] if once else sys.stdin):
        path = line.strip()
        start = time.perf_counter()
        value = case.run()
        seconds = time.perf_counter() - start
        if path:
            np.save(path, case.result(value))
        del value
        if number == 0 and not once:
            case.settle()
        print(json.dumps({"seconds": seconds, "device bytes": case.device_peak()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
