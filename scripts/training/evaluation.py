"""Measures of the checkpoints on held-out texts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from jaxqkv.architectures.activations import Attention
from jaxqkv.architectures.gpt2 import GPT2Config
from jaxqkv.checkpoints.folder import SINGLE
from jaxqkv.model.model import Model
from jaxqkv.text.batches import BatchLike
from training.mixture import mask_tokens, repeated_tokens, windows
from training.sentences import HELD_OUT_TEMPLATE, NAMES, Sentence, make_sentence
from training.sizes import BERT_SPECIALS
from training.texts import split, token_stream

WINDOWS, BATCH = 128, 16
RANGES = ((1, 64), (64, 128), (128, 256))
PERIOD, MASKED = 64, 0.15
SENTENCES = 400
# The two sentences of a study; neither the pair of names nor the place with the thing occurs in training.
STUDIED = (
    Sentence("When Mike and Emma went to the cafe, Emma gave a coffee to", "Mike", "Emma"),
    Sentence("When Mike and Emma went to the cafe, Mike gave a coffee to", "Emma", "Mike"),
)


def cross_entropy(logits: Any, truth: np.ndarray) -> np.ndarray:
    """Returns −log probability of the true ids, in nats, of logits that have the vocabulary as one more axis."""
    logits = np.asarray(logits, np.float64)
    largest = logits.max(-1, keepdims=True)
    normaliser = np.log(np.exp(logits - largest).sum(-1)) + largest[..., 0]
    return normaliser - np.take_along_axis(logits, truth[..., None], -1)[..., 0]


def next_token_losses(model: Model, ids: np.ndarray) -> np.ndarray:
    """Returns `[window, pos - 1]`: GPT-2's loss at every token but the first, in nats."""
    pieces = [ids[start : start + BATCH] for start in range(0, len(ids), BATCH)]
    return np.concatenate([cross_entropy(model.logits(piece)[:, :-1], piece[:, 1:]) for piece in pieces])


def masked_token_logits(model: Model, batch: BatchLike, places: np.ndarray | None = None) -> np.ndarray:
    """Returns BERT's logits `[batch, pos, vocab]`, through the masked-token head of the checkpoint's file.

    With `places`, positions `[batch, chosen]`, only the logits there.
    """
    tensors = {key: tensor.astype(np.float32) for key, tensor in load_file(model.checkpoint.folder / SINGLE).items()}
    at, dense, norm = (f"cls.predictions{part}" for part in ("", ".transform.dense", ".transform.LayerNorm"))
    x = np.asarray(model.hidden(batch))
    if places is not None:
        x = np.take_along_axis(x, places[..., None], 1)
    x = x @ tensors[f"{dense}.weight"].T + tensors[f"{dense}.bias"]
    x = np.asarray(jax.nn.gelu(x, approximate=False))
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + model.config.layer_norm_epsilon)
    x = x * tensors[f"{norm}.weight"] + tensors[f"{norm}.bias"]
    return x @ tensors["bert.embeddings.word_embeddings.weight"].T + tensors[f"{at}.bias"]


def masked_token_losses(model: Model, ids: np.ndarray, masked: float = MASKED, seed: int = 0) -> np.ndarray:
    """Returns `[window, chosen]`: BERT's loss at the chosen tokens, in nats."""
    token = model.tokenizer.backend.token_to_id
    first, ends = len(BERT_SPECIALS), (token("[CLS]"), token("[SEP]"))
    generator = np.random.default_rng(seed)
    corrupted, chosen, truth = mask_tokens(
        ids, generator, ends, token("[MASK]"), first, model.config.vocab_size, masked
    )
    losses = []
    for start in range(0, len(ids), BATCH):
        piece = slice(start, start + BATCH)
        losses.append(cross_entropy(masked_token_logits(model, corrupted[piece], chosen[piece]), truth[piece]))
    return np.concatenate(losses)


def attention_back(model: Model, ids: np.ndarray, back: int, first: int) -> np.ndarray:
    """Returns `[layer, head]`: mean attention from each position, from `first` on, to the one `back` before it."""

    def reduce(attention: Attention, mask: jax.Array) -> jax.Array:
        assert attention.pattern is not None
        return jnp.diagonal(attention.pattern, -back, 2, 3)[..., first - back :].mean(-1)

    return np.asarray(model.run(ids, reduce=reduce)).mean(1)


def repeated_random(model: Model, count: int, period: int, seed: int) -> np.ndarray:
    """Returns `[count, 2 · period]`: random tokens, said twice."""
    generator = np.random.default_rng(seed)
    first = 1 if isinstance(model.config, GPT2Config) else len(BERT_SPECIALS)
    rows = [repeated_tokens(generator, first, model.config.vocab_size, period, 2 * period) for _ in range(count)]
    return np.stack(rows)


def name_scores(model: Model, sentences: list[Sentence]) -> np.ndarray:
    """Returns logit(next name) − logit(other name) of each sentence; BERT's at a [MASK] before "."."""
    names = [[f" {sentence.answer}", f" {sentence.other}"] for sentence in sentences]
    ids = np.array([[model.tokenizer.single_token(name) for name in pair] for pair in names])
    if isinstance(model.config, GPT2Config):
        batch = model.tokenize([sentence.prompt for sentence in sentences])
        last = np.asarray(batch.mask).sum(1) - 1
        logits = np.asarray(model.logits(batch))[np.arange(len(ids)), last]
    else:
        batch = model.tokenize([f"{sentence.prompt} [MASK]." for sentence in sentences])
        places = np.argmax(np.asarray(batch.ids) == model.tokenizer.backend.token_to_id("[MASK]"), axis=1)
        logits = masked_token_logits(model, batch, places[:, None])[:, 0]
    answer, other = np.take_along_axis(logits, ids, 1).T
    return answer - other


def unigram_loss(text: np.ndarray, held_out: np.ndarray, vocab: int) -> float:
    """Returns the held-out loss of a model that knows only how frequent tokens are."""
    counts = np.bincount(text, minlength=vocab) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())


def evaluate(model: Model, documents: list[str], seed: int = 1) -> dict[str, float]:
    """Returns the measures that the README of the checkpoints reports, by name, losses in nats a token."""
    tokenizer = model.tokenizer.backend
    text, rest = (token_stream(tokenizer, model.config, texts) for texts in split(documents))
    generator = np.random.default_rng(seed)
    ids = windows(rest, generator, WINDOWS, model.config.n_positions)
    measures = {"unigram model, held-out text": unigram_loss(text, rest, model.config.vocab_size)}
    repeated = repeated_random(model, 32, PERIOD, seed)
    if isinstance(model.config, GPT2Config):
        losses = next_token_losses(model, ids)
        measures["held-out text"] = losses.mean()
        for first, last in RANGES:
            measures[f"held-out text, positions {first}–{last - 1}"] = losses[:, first - 1 : last - 1].mean()
        seen = windows(text, generator, WINDOWS, model.config.n_positions)
        measures["text of the training"] = next_token_losses(model, seen).mean()
        losses = next_token_losses(model, repeated)
        measures["random tokens, first time"] = losses[:, : PERIOD - 1].mean()
        measures["random tokens, second time"] = losses[:, PERIOD:].mean()
    else:
        measures["held-out text, 15 % masked"] = masked_token_losses(model, ids).mean()
        seen = windows(text, generator, WINDOWS, model.config.n_positions)
        measures["text of the training, 15 % masked"] = masked_token_losses(model, seen).mean()
        measures["random tokens that come twice, 15 % masked"] = masked_token_losses(model, repeated).mean()
    strongest = {
        "induction": attention_back(model, repeated, PERIOD - 1, PERIOD + 1),
        "previous token": attention_back(model, ids[:32], 1, 1),
    }
    for name, attention in strongest.items():
        layer, head = np.unravel_index(attention.argmax(), attention.shape)
        measures[f"attention of the strongest {name} head (layer {layer}, head {head})"] = attention.max()
    return {name: float(value) for name, value in (measures | names_measures(model, seed)).items()}


def names_measures(model: Model, seed: int) -> dict[str, float]:
    """Returns how often, of held-out pairs of names, the right one is more probable than the other.

    Only NaN, under a name that says why, if the tokenizer has no single tokens for them.
    """
    pieces = model.tokenizer.encode([f" {name}" for name in NAMES], special_tokens=False)
    unknown = [name for name, ids in zip(NAMES, pieces, strict=True) if len(ids) != 1]
    if unknown:
        return {f"names not measured: no single tokens are {', '.join(unknown)}": np.nan}
    kinds: dict[str, Callable[[np.random.Generator], Sentence]] = {
        "held-out pairs of names": lambda generator: make_sentence(generator, held_out=True),
        "held-out pairs in a held-out template": lambda generator: make_sentence(
            generator, held_out=True, template=HELD_OUT_TEMPLATE
        ),
    }
    measures = {}
    for name, make in kinds.items():
        generator = np.random.default_rng(seed)
        scores = name_scores(model, [make(generator) for _ in range(SENTENCES)])
        measures[f"{name}: right one more probable"] = (scores > 0).mean()
        measures[f"{name}: mean difference of logits"] = scores.mean()
    for sentence, score in zip(STUDIED, name_scores(model, list(STUDIED)), strict=True):
        measures[f"“{sentence.prompt}”: logit of {sentence.answer} − {sentence.other}"] = score
    return measures
