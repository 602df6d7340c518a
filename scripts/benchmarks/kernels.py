"""Kernels on random arrays of the studies' shapes."""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.sides import Spec, Work, jax_work, on_torch, torch_work

# Cases, with the name of the baselines' function.
KERNELS = {
    "last-token scores": "last_token_densities",
    "causal samples": "causal_densities",
    "head pairs": "head_pair_densities",
    "column cosines": "column_cosine_moments",
    "groups of dimensions": "group_densities",
    "binned scores": "binned_moments",
    "principal components": "principal_components",
    "distance from normal": "ks_normal",
    "neighbouring positions": "neighbour_correlations",
    "singular values": "spectrum",
    "permuted histograms": "permuted_divergences",
    "statistics of attention": "attention_statistics",
    "composition": "composition",
}


def kernel_arguments(name: str, small: bool) -> tuple[Any, ...]:
    """Returns the function's arguments: random arrays of GPT-2's shapes, or small ones, and settings."""
    generator = np.random.default_rng(0)
    n_head, pos, head_dim, width = (3, 29, 8, 24) if small else (16, 115, 64, 768)
    layers, length, bins = (2, 31, 8) if small else (24, 512, 40)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * generator.normal(size=shape)).astype(np.float32)

    if name in ("last-token scores", "causal samples"):
        edges = np.linspace(-20, 20, 101) if name == "last-token scores" else np.linspace(0, 1, 91)
        return normal(n_head, pos, head_dim), normal(n_head, pos, head_dim), edges
    if name == "head pairs":
        return normal(width, width, scale=0.1), 3 if small else 12, np.linspace(-0.4, 0.4, 101)
    if name == "groups of dimensions":
        return normal(54, 3 * width), np.linspace(-1, 1, 101)
    if name == "binned scores":
        frequency = generator.normal(-8, 2, length)
        sums = frequency[:, None] + frequency[None, :]
        return sums, normal(layers, length, length), np.percentile(sums, np.linspace(0, 100, bins + 1))
    if name in ("column cosines", "singular values"):
        return (normal(width, width, scale=0.1),)
    if name == "permuted histograms":
        permutations, layers, length, bins = (37, 2, 31, 8) if small else (1000, 36, 1024, 30)
        flags = np.arange(length) < 0.4 * length
        permuted = np.array([generator.permutation(flags) for _ in range(permutations)])
        return permuted.astype(np.float32), normal(layers, length), bins
    if name == "statistics of attention":
        return normal(n_head, length, head_dim), normal(n_head, length, head_dim)
    if name == "composition":
        return tuple(normal(3 if small else 12, width, head_dim, scale=0.1) for _ in range(4))
    if name == "neighbouring positions":
        return (normal(4 * width // 3, width),)
    return (normal(width, 3 * width, scale=0.1),)


def kernel(side: str, spec: Spec) -> Work:
    arguments = kernel_arguments(spec["kernel"], spec["small"])
    if side == "jaxqkv":
        return jax_work(_jaxqkv_kernel(spec["kernel"], *arguments))
    import importlib

    put, *_ = on_torch(spec["device"])
    function = getattr(importlib.import_module(f"baselines.{side}"), KERNELS[spec["kernel"]])
    on_device = [put(x) if isinstance(x, np.ndarray) and x.ndim > 1 else x for x in arguments]
    return torch_work(lambda: function(*on_device), spec)


def _jaxqkv_kernel(name: str, *arguments: Any) -> Callable[[], Any]:
    """Returns the package's kernel on arrays that are on the device."""
    import jax
    import jax.numpy as jnp

    from jaxqkv import kernels
    from jaxqkv.architectures import attention
    from jaxqkv.runtime.devices import jit

    first = jnp.asarray(arguments[0])
    if name in ("last-token scores", "causal samples"):
        k, edges = jnp.asarray(arguments[1]), arguments[2]
        mask = np.ones((1, first.shape[1]), bool)

        @jit
        def samples(q: Any, k: Any) -> Any:
            if name == "last-token scores":
                chosen = kernels.last_token_scores(q[None], k[None], mask)
            else:
                visible = attention.visible_keys(mask, causal=True)[:, None]
                pattern = attention.attention_pattern(attention.scaled_scores(q[None], k[None]), visible)
                chosen = kernels.causal_samples(pattern, mask)
            return jnp.stack([kernels.density(each.values, edges, each.where) for each in chosen])

        return lambda: samples(first, k)
    if name in ("statistics of attention", "composition"):
        on_device = [jnp.asarray(each) for each in arguments]
        if name == "composition":
            return lambda: kernels.composition(*on_device)
        q, k = (each[None] for each in on_device)
        mask = jnp.ones((1, q.shape[2]), bool)
        return lambda: jnp.concatenate(kernels.attention_statistics(q, k, mask, causal=True))
    if name == "binned scores":
        sums, scores, edges = arguments
        on_device = jnp.asarray(scores)

        @jit
        def binned(scores: Any, index: Any) -> Any:
            moments = lambda layer: kernels.binned_moments(layer.ravel(), index, n_bin=len(edges) - 1)  # noqa: E731
            return jax.lax.map(lambda layer: jnp.stack(moments(layer)[1:]), scores)

        return lambda: binned(on_device, kernels.bin_index(sums, edges).ravel())

    if name == "permuted histograms":
        _, values, bins = arguments
        index = [kernels.bin_index(row, np.linspace(row.min(), row.max(), bins + 1)) for row in values]
        hot = jnp.asarray(np.stack(index)[..., None] == np.arange(bins), jnp.float32)

        @jit
        def divergences(flags: Any) -> Any:
            one = jnp.einsum("np,lpb->nlb", flags, hot)
            return jax.vmap(jax.vmap(kernels.jensen_shannon))(one, hot.sum(axis=1)[None] - one)

        return lambda: divergences(first)

    def shares_and_scores(w: Any) -> Any:
        shares, scores = kernels.principal_components(w)
        return jnp.concatenate([shares, scores.ravel() / jnp.abs(scores).max()])

    functions = {
        "head pairs": lambda w: kernels.head_pair_densities(w, arguments[2], n_head=arguments[1])[0],
        "column cosines": lambda w: jnp.stack(kernels.column_cosine_moments(w)),
        "groups of dimensions": lambda x: kernels.group_densities(x, arguments[1], centred=True),
        "principal components": shares_and_scores,
        "distance from normal": lambda w: kernels.ks_normal(w, w.mean(), w.std())[None],
        "neighbouring positions": kernels.neighbour_correlations,
        "singular values": lambda w: jnp.stack(kernels.spectrum(w)),
    }
    function = jit(functions[name])
    return lambda: function(first)
