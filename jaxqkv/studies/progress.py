"""Progress of a run that reduces every layer inside the model."""

import contextlib
from collections.abc import Iterator

from jaxqkv.model.request import Progress
from jaxqkv.runtime import console


@contextlib.contextmanager
def layer_progress(n_layer: int) -> Iterator[Progress]:
    """Shows a bar for a `with` block, and gives what `Model.run` takes as `progress`."""
    with console.bar(total=n_layer, desc="layers", unit="layer") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
