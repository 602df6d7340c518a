"""Study 4: weights alone."""

import itertools

import numpy as np
import torch

from baselines import tuned as fast
from baselines.parts import Weights, histogram, host, nearest


def notebook(job):
    from scipy import stats
    from scipy.cluster.hierarchy import linkage
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(job["models"][0], dtype=torch.float32)
    state = model.state_dict()
    layers, width, n_head = model.config.n_layer, model.config.n_embd, model.config.n_head

    def attention(layer):
        return state[f"transformer.h.{layer}.attn.c_attn.weight"].numpy()

    positions = state["transformer.wpe.weight"].numpy()
    variance = np.var(positions, axis=0, dtype=np.float64)
    order = np.argsort(variance, kind="stable")
    chosen = [nearest(dimension, width, 768) for dimension in (400, 600, 700)]
    varied = [order[0], order[len(order) // 2], order[-1]]
    figures = {
        "architecture": {"total_with_tied": np.array(sum(np.prod(tensor.shape) for tensor in state.values()))},
        "positions": {"positions": positions},
        "position-dimension": {"values": positions[:, nearest(500, width, 768)]},
        "position-dimensions": {"dimensions": np.array(chosen), "values": positions[:, chosen].T},
        "position-variance": {"dimensions": np.array(varied), "values": positions[:, varied].T, "variance": variance},
        "position-correlation": {
            "r": np.array([stats.pearsonr(one, two)[0] for one, two in itertools.pairwise(positions)])
        },
    }
    weights = attention(0)
    flat = weights.flatten()
    mean, std = np.mean(flat, dtype=np.float64), np.std(flat, dtype=np.float64)
    density, edges = histogram(flat, 50)
    test = stats.kstest(flat, "norm", args=(mean, std))
    figures["weight-histogram"] = {
        "density": density,
        "edges": edges,
        "mean": np.array(mean),
        "std": np.array(std),
        "skewness": np.array(stats.skew(flat.astype(np.float64))),
        "kurtosis": np.array(stats.kurtosis(flat.astype(np.float64))),
        "ks": np.array(test.statistic),
        "p": np.array(test.pvalue),
    }
    figures["weights"] = {"weights": weights}

    def window(top, bottom, left, right):
        top, bottom, left, right = (x if width >= 768 else x * width // 768 for x in (top, bottom, left, right))
        return weights[top:bottom, left:right]

    figures["weights-zoom"] = {"window_1": window(0, 300, 100, 300), "window_2": window(300, 600, 200, 400)}
    shown = [*range(3), *range(layers - 3, layers)]
    explained, rows, share = [], [], []
    for layer in shown:
        analysis = PCA()
        scores = analysis.fit_transform(StandardScaler().fit_transform(attention(layer)))
        explained.append(np.cumsum(analysis.explained_variance_ratio_))
        rows.append(scores[:, :2])
        share.append(analysis.explained_variance_ratio_[0])
    figures["pca-variance"] = {"layers": np.array(shown), "explained": np.array(explained)}
    figures["pca-scatter"] = {"layers": np.array(shown), "scores": np.array(rows), "explained": np.array(share)}
    all_layers = [attention(layer) for layer in range(layers)]
    figures["layer-statistics"] = {
        name: np.array([getattr(w, name)() for w in all_layers]) for name in ("mean", "std", "max", "min")
    }
    figures["row-variance"] = {"variance": np.array([np.var(w, axis=1) for w in all_layers])}

    def heads(layer):
        """Returns W_Q of each head, `[head, embed, head_dim]`."""
        return attention(layer)[:, :width].reshape(width, n_head, -1).transpose(1, 0, 2)

    figures["query-heads"] = {"heads": heads(0).reshape(n_head, -1)}
    figures["head-clusters"] = {
        "layers": np.array(shown),
        "linkage": np.array([linkage([head.mean(axis=1) for head in heads(layer)], "ward") for layer in shown]),
    }
    signature = {name: np.zeros((layers, 3)) for name in ("ks", "kurtosis", "effective_rank", "largest_singular_value")}
    for layer in range(layers):
        for part, w in enumerate(np.split(attention(layer), 3, axis=1)):
            flat = w.ravel()
            signature["ks"][layer, part] = stats.kstest(flat, "norm", args=(flat.mean(), flat.std())).statistic
            signature["kurtosis"][layer, part] = stats.kurtosis(flat)
            values = np.linalg.svd(w, compute_uv=False)
            p = values / values.sum()
            signature["effective_rank"][layer, part] = np.exp(-(p * np.log(p)).sum())
            signature["largest_singular_value"][layer, part] = values[0]
    figures["training-signature"] = signature
    return figures


@torch.inference_mode()
def tuned(job):
    from scipy.cluster.hierarchy import linkage
    from scipy.special import kolmogorov

    file = Weights(job["models"][0], job["device"])
    layers, width, n_head = file.layers, file.width, file.n_head
    positions = file["wpe.weight"].cpu().numpy()
    variance = np.var(positions, axis=0, dtype=np.float64)
    order = np.argsort(variance, kind="stable")
    scaled = [x if width >= 768 else x * width // 768 for x in (0, 100, 200, 300, 400, 500, 600, 700)]
    zero, one, two, three, four, five, six, seven = scaled
    chosen, varied = [four, six, seven], order[[0, len(order) // 2, -1]]
    centred = positions - positions.mean(axis=1, keepdims=True)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)

    first = file.attention(0)
    std, mean = torch.std_mean(first.double(), correction=0)
    units = ((first - mean) / std).double()
    ks = fast.ks_normal(first)[0]
    density, edges = np.histogram(first.cpu().numpy(), bins=50, density=True)
    shown = [*range(3), *range(layers - 3, layers)]
    components, rows, linkages = [], [], []
    statistics, row_variance = [], []
    names = ("ks", "kurtosis", "effective_rank", "largest_singular_value")
    signature = {name: torch.zeros(layers, 3) for name in names}
    for layer in range(layers):
        w = file.attention(layer)
        low, high = w.aminmax()
        statistics.append(torch.stack([w.mean(), w.std(correction=0), high, low]))
        row_variance.append(w.var(dim=1, correction=0))
        if layer in shown:
            shares, scores = fast.component_shares_and_scores(w)
            components.append(shares)
            rows.append(scores)
            heads = w[:, :width].view(width, n_head, -1).mean(dim=2).T
            linkages.append(linkage(heads.cpu().numpy(), "ward"))
        for part, matrix in enumerate(w.split(width, dim=1)):
            signature["ks"][layer, part] = fast.ks_normal(matrix)[0]
            std_, mean_ = torch.std_mean(matrix, correction=0)
            signature["kurtosis"][layer, part] = (((matrix - mean_) / std_) ** 4).mean() - 3
            values = torch.linalg.svdvals(matrix)
            p = values / values.sum()
            signature["effective_rank"][layer, part] = (-(p * p.log()).sum()).exp()
            signature["largest_singular_value"][layer, part] = values[0]
    explained = torch.stack(components)
    mean_, std_, high, low = torch.stack(statistics).T
    tied = file.config["vocab_size"] * width
    return host(
        {
            "architecture": {"total_with_tied": sum(map(file.size, file.keys)) + tied},
            "positions": {"positions": positions},
            "position-dimension": {"values": positions[:, five]},
            "position-dimensions": {"dimensions": chosen, "values": positions[:, chosen].T},
            "position-variance": {"dimensions": varied, "values": positions[:, varied].T, "variance": variance},
            "position-correlation": {"r": (centred[1:] * centred[:-1]).sum(axis=1)},
            "weight-histogram": {
                "density": density,
                "edges": edges,
                "mean": mean,
                "std": std,
                "skewness": (units**3).mean(),
                "kurtosis": (units**4).mean() - 3,
                "ks": ks,
                "p": kolmogorov(ks.item() * first.numel() ** 0.5),
            },
            "weights": {"weights": first},
            "weights-zoom": {"window_1": first[zero:three, one:three], "window_2": first[three:six, two:four]},
            "pca-variance": {"layers": shown, "explained": explained.cumsum(dim=1)},
            "pca-scatter": {"layers": shown, "scores": torch.stack(rows), "explained": explained[:, 0]},
            "layer-statistics": {"mean": mean_, "std": std_, "max": high, "min": low},
            "row-variance": {"variance": torch.stack(row_variance)},
            "query-heads": {"heads": first[:, :width].unflatten(1, (n_head, -1)).transpose(0, 1).flatten(1)},
            "head-clusters": {"layers": shown, "linkage": np.array(linkages)},
            "training-signature": signature,
        }
    )
