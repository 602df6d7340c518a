"""Colours, file formats and matplotlib settings, the same in every figure of the project."""

from typing import Any

# Formats of a picture; the first is always written, since the page shows it.
FORMATS = ("png", "svg", "pdf")

Q, K, V = "#d1495b", "#3a9d5d", "#4a78c9"
WITHIN, ACROSS = "#8457b3", "#e08a1e"
TARGET, NON_TARGET = "#1f9e9e", "#b5651d"
CORRECT, INCORRECT = "#2f8f4e", "#b03a6b"
MEAN, STD = "#2b6cb0", "#c05621"
POINTS, FIRST = "0.45", "#d62728"
QKV = {"Q": Q, "K": K, "V": V}
# Colours of pairs of Q, K and V: the matrix's own within one, a blend across two.
GROUPS = {"QQ": Q, "KK": K, "VV": V, "QK": "#b8862f", "QV": "#8e5fb0", "KV": "#2f8f9b"}
# Label of attention scores, which are scaled and before any mask.
SCORE = r"$\mathbf{QK^\top/\sqrt{d}}$"
# Colours of the parts of a model.
CATEGORIES = {
    "Token Embedding": "#4a78c9",
    "Positional Embedding": "#1f9e9e",
    "Token Type Embedding": "#8e9aaf",
    "Attention": "#d1495b",
    "Feed Forward": "#e08a1e",
    "Layer Norm": "#6a4c93",
    "Output Embedding": "#3a9d5d",
}
# Colours and line styles of compared checkpoints, in their order.
CHECKPOINTS = ("#4a78c9", "#e08a1e", "#3a9d5d", "#8457b3", "#d1495b", "#8e9aaf")
LineStyle = str | tuple[int, tuple[int, ...]]  # a word, or matplotlib's (offset, (on, off, …))
LINES: tuple[LineStyle, ...] = (
    "-",
    "--",
    ":",
    "-.",
    (0, (1, 3)),
    (0, (8, 2)),
    (0, (8, 2, 1, 2, 1, 2)),
)
MARKERS = {"Q": "s", "K": "o", "V": "^"}

_PAPER = {"light": ("white", "black"), "dark": ("#282a2c", "#DDE2F4")}
THEMES = tuple(_PAPER)


def settings(theme: str) -> dict[str, Any]:
    """Returns the `rcParams` of a theme; "dark" is the originals' dark palette."""
    paper, ink = _PAPER[theme]
    return {
        "figure.facecolor": paper,
        "figure.edgecolor": paper,
        "savefig.facecolor": paper,
        "axes.facecolor": paper,
        "axes.edgecolor": ink,
        "axes.labelcolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "text.color": ink,
        "legend.labelcolor": ink,
        "legend.framealpha": 0.75,
        "legend.edgecolor": "none",
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titleweight": "bold",
        "axes.labelweight": "bold",
        "figure.titleweight": "bold",
        "font.size": 10,
        "axes.titlesize": 11,
        "figure.titlesize": 12,
        "lines.linewidth": 1.6,
        "svg.fonttype": "none",
        "svg.hashsalt": "jaxqkv",
        "pdf.fonttype": 42,
    }
