"""Figures 5 to 7: similarities within and across categories."""

import jax
import numpy as np
from jaxtyping import Bool, Shaped

from jaxqkv.figures import style
from jaxqkv.figures.displays import Display, layer_lines, rows_of
from jaxqkv.figures.distributions import Bars
from jaxqkv.figures.panels import Line, Lines, Panel
from jaxqkv.kernels import fisher_z, freedman_diaconis_histogram
from jaxqkv.studies.category_selectivity import STUDY
from jaxqkv.studies.category_selectivity.figures import NAMES
from jaxqkv.studies.category_selectivity.run import CategorySelectivityRun, Reduced
from jaxqkv.studies.category_selectivity.selectivity import Selectivity, difference_tests, selectivity
from jaxqkv.studies.significance import LEVEL, marked

# Number of values in figure 7a.
UNIFORM = 10_000


@STUDY.define(
    "5",
    "similarities within and across categories",
    "t [qkv], density_GROUP_MATRIX [bin], edges_GROUP_MATRIX [edge]; GROUP: within, across; MATRIX: q, k, v",
)
def figure_5(run: CategorySelectivityRun, shown: Reduced) -> Display:
    masks = run.words.masks()
    t = selectivity(shown["similarity"][None], run.words).t[0]
    arrays, panels = {"t": t}, []
    for name, values, statistic in zip(NAMES, shown["similarity"], t, strict=True):
        lines = []
        for kind, color in (("within", style.WITHIN), ("across", style.ACROSS)):
            heights, edges = freedman_diaconis_histogram(values[masks[kind]], density=True)
            arrays |= {f"density_{kind}_{name.lower()}": heights, f"edges_{kind}_{name.lower()}": edges}
            lines.append(Line(x=edges[:-1], y=heights, label=f"{kind.capitalize()} categories", color=color))
        panels.append(
            Lines(lines=lines, xlabel="Cosine similarity", ylabel="Density", title=f"{name}, t = {statistic:.2f}")
        )
    return Display(
        arrays=arrays,
        panels=[panels],
        title=run.heading,
        caption=f"Cosine similarities of pairs of words within and across categories in {run.where}: densities at "
        f"left edges, and Student's t (pooled variance). Pairs that share a word are not independent, so t is not "
        f"a test; figure 6a has one.{run.of_words}{run.layer_note}",
        size=(13, 4.3),
    )


def tested(
    run: CategorySelectivityRun, layers: Reduced
) -> tuple[dict[str, Shaped[np.ndarray, "layer qkv"]], Bool[np.ndarray, "layer qkv"]]:
    """Returns the arrays of figures 6a and 6b, and which differences are significant."""
    similarity = layers["similarity"]
    found = selectivity(similarity, run.words)
    p, q = difference_tests(similarity, run.words, run.seed, run.permutations)
    return {**found._asdict(), "p": p, "q_value": q}, q < LEVEL


@STUDY.define("6a", "category selectivity by layer", "difference, t, average, p, q_value [layer, qkv]")
def figure_6a(run: CategorySelectivityRun, layers: Reduced) -> Display:
    arrays, significant = tested(run, layers)
    x = np.arange(len(significant))
    panels: list[Panel] = []
    for name, ylabel, title in (
        ("difference", "Within − across", "A) Difference of the similarities"),
        ("t", "t", "B) Student's t"),
    ):
        lines = []
        for index, (label, color) in enumerate(style.QKV.items()):
            look = {"label": label, "color": color, "marker": style.MARKERS[label]}
            lines += marked(x, arrays[name][:, index], significant[:, index], **look)
        panels.append(
            Lines(lines=lines, xlabel="Transformer layer", ylabel=ylabel, title=title, integer_x=True, zero_y=True)
        )
    return Display(
        arrays=arrays,
        panels=[panels],
        title=run.label,
        caption=f"Cosine similarity within − across categories in each layer of {run.name}, and Student's t. Filled: "
        f"the difference has q < 0.05 of {significant.size} one-sided tests, in which the words' categories are "
        f"permuted ({run.permutations:,} times, seed {run.seed}).{run.of_words}",
        size=(12, 4.3),
    )


def scatter(found: Selectivity, what: str) -> list[list[Panel]]:
    """Returns panels of difference and t against the average similarity, with a point for each layer."""
    panels: list[Panel] = []
    for values, xlabel in ((found.difference, f"{what[0].upper()}{what[1:]}, within − across"), (found.t, "t")):
        for index, name in enumerate(NAMES):
            lines = layer_lines(np.asarray(values)[:, index, None], np.asarray(found.average)[:, index, None])
            for line in lines:
                line.marker = style.MARKERS[name]
            panels.append(
                Lines(
                    lines=lines,
                    xlabel=xlabel,
                    ylabel=f"Average {what}" if not index else "",
                    title=name,
                    zero_x=True,
                    colorbar="Transformer layer" if name == NAMES[-1] else "",
                )
            )
    return [list(row) for row in rows_of(panels, 3)]


@STUDY.define(
    "6b",
    "category selectivity against average similarity",
    "difference, t, average, p, q_value [layer, qkv]",
)
def figure_6b(run: CategorySelectivityRun, layers: Reduced) -> Display:
    arrays, _ = tested(run, layers)
    found = Selectivity(arrays["difference"], arrays["t"], arrays["average"])
    return Display(
        arrays=arrays,
        panels=scatter(found, "cosine similarity"),
        title=run.label,
        caption=f"Figure 6a's difference and t against the average similarity, ½ (within + across), of Q, K and V in "
        f"each layer of {run.name}.{run.of_words}",
        size=(13, 7.6),
    )


@STUDY.define(
    "7a",
    "what Fisher's z does to cosines",
    "cosine, z [value], counts_SAMPLE [bin], edges_SAMPLE [edge]; SAMPLE: cosine, z",
)
def figure_7a(run: CategorySelectivityRun) -> Display:
    cosine = jax.random.uniform(jax.random.key(run.seed), (UNIFORM,), minval=-1, maxval=1)
    values = {"cosine": np.asarray(cosine), "z": np.asarray(fisher_z(cosine))}
    arrays, bars = dict(values), []
    for (name, sample), color in zip(values.items(), (style.MEAN, style.STD), strict=True):
        counts, edges = freedman_diaconis_histogram(sample)
        arrays |= {f"counts_{name}": counts, f"edges_{name}": edges}
        label = "Cosine" if name == "cosine" else "Fisher's z"
        letter = "B" if name == "cosine" else "C"
        bars.append(
            Bars(heights=counts, edges=edges, color=color, xlabel=label, ylabel="Count", title=f"{letter}) {label}")
        )
    points = Line(x=values["cosine"], y=values["z"], color=style.STD, marker=".", linestyle="", label="Fisher's z")
    identity = Line(x=np.array([-1.0, 1.0]), y=np.array([-1.0, 1.0]), color="0.5", linestyle="--", label="Identity")
    curve = Lines(lines=[points, identity], xlabel="Cosine", ylabel="Fisher's z", title="A) artanh of the cosine")
    return Display(
        arrays=arrays,
        panels=[[curve, *bars]],
        caption=f"{UNIFORM:,} uniform values from −1 to 1 against their Fisher's z, artanh(cosine), and the counts of "
        f"both. Seed {run.seed}; no checkpoint is used.",
        size=(13, 4.1),
    )


@STUDY.define(
    "7b",
    "category selectivity against average similarity, in Fisher's z",
    "difference, t, average [layer, qkv]",
)
def figure_7b(run: CategorySelectivityRun, layers: Reduced) -> Display:
    found = selectivity(np.asarray(fisher_z(layers["similarity"])), run.words)
    return Display(
        arrays=found._asdict(),
        panels=scatter(found, "Fisher's z"),
        title=run.label,
        caption=f"Figure 6b of Fisher's z of the cosines, artanh(cosine): the average is that of the two means of z, "
        f"in each layer of {run.name}.{run.of_words}",
        size=(13, 7.6),
    )
