"""The cases of each size of the benchmark, `full`, `quick`, `large` and `demo`, but for the studies."""

from typing import Any

# Checkpoint, sentences, tokens of each, and further settings for `passes.py`. `large` has batches that fill an
# accelerator.
FORWARDS: dict[str, tuple[tuple[str, int, int, dict[str, Any]], ...]] = {
    "quick": (("random:gpt2", 54, 24, {"padded": True}), ("random:gpt2", 4, 128, {"cache": True})),
    "full": (
        ("random:gpt2", 54, 24, {"padded": True}),
        ("random:gpt2", 4, 128, {"cache": True}),
        ("random:gpt2-medium", 1, 115, {}),
        ("random:gpt2-medium", 8, 512, {}),
        ("random:gpt2-xl", 1, 115, {}),
        ("random:bert-large-uncased", 8, 512, {}),
        ("random:bert-large-uncased", 64, 512, {"norms": True}),
    ),
    "large": (
        ("random:gpt2-medium", 64, 512, {}),
        ("random:bert-large-uncased", 64, 512, {}),
        ("random:gpt2", 540, 24, {"padded": True}),
    ),
    "demo": (
        ("demo-gpt2", 5, 31, {"padded": True}),
        ("demo-bert", 5, 31, {}),
        ("demo-bert", 9, 13, {"norms": True}),
        ("demo-gpt2", 3, 19, {"cache": True}),
    ),
}
# Passes after the sweeps and kernels: of a checkpoint that takes long to write and to load, and in TensorFloat-32.
LAST_FORWARDS: dict[str, tuple[tuple[str, int, int, dict[str, Any]], ...]] = {
    "large": (
        ("random:gpt2-xl", 8, 512, {}),
        ("random:gpt2-medium", 64, 512, {"tf32": True}),
        ("random:bert-large-uncased", 64, 512, {"tf32": True}),
    ),
}
FIRST_USES = {"quick": ("random:gpt2",), "full": ("random:gpt2", "random:gpt2-medium"), "demo": ("demo-gpt2",)}
# Checkpoint, and number of tokens of the text whose heads are silenced.
SWEEPS = {
    "quick": (("random:gpt2", 17),),
    "full": (("random:gpt2", 17), ("random:gpt2-medium", 24)),
    "large": (("random:gpt2", 17), ("random:gpt2-medium", 24)),
    "demo": (("demo-gpt2", 7),),
}
# Kernels of the size `large`; the other sizes have all kernels.
LARGE_KERNELS = ("composition", "head pairs", "column cosines", "binned scores", "statistics of attention")
