"""Trains the two bundled checkpoints on a folder of texts.

    python scripts/train_demo.py FOLDER                      both, into jaxqkv/demo
    python scripts/train_demo.py FOLDER --only demo-bert --steps 200 --out my-demo

FOLDER holds .txt files (a document each) and .jsonl files (a document a line, in the field "text");
the texts of Python's own help (`pydoc_data.topics`) are added. The last twentieth of every document
is held out. Needs the extra `train` (optax). The forward pass is the package's own.
"""

import argparse
import json
import pydoc_data.topics
import re
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import jaxqkv
from jaxqkv.architectures.bert import BertConfig
from jaxqkv.architectures.gpt2 import GPT2Config
from jaxqkv.checkpoints.checkpoint import BUNDLED
from jaxqkv.checkpoints.config import Config
from jaxqkv.checkpoints.folder import save_checkpoint
from jaxqkv.checkpoints.weights import tensors_from_params

VOCAB, LENGTH, TOKENS_A_STEP = 4096, 256, 4096
SIZES = {
    "vocab_size": VOCAB,
    "n_positions": LENGTH,
    "n_embd": 128,
    "n_layer": 8,
    "n_head": 8,
    "n_inner": 512,
    "initializer_range": 0.02,
}
CONFIGS: dict[str, Config] = {
    "demo-gpt2": GPT2Config(
        **SIZES,
        activation="gelu_new",
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        tie_word_embeddings=True,
    ),
    "demo-bert": BertConfig(**SIZES, activation="gelu", layer_norm_epsilon=1e-12, type_vocab_size=2),
}
BERT_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
END = "<|endoftext|>"
MASKED = 0.3  # of a window's tokens: twice BERT's, since a short training gains by more predictions
LEARNING_RATE = {"demo-gpt2": 3e-3, "demo-bert": 2e-3}  # post-norm blocks bear less


def read_documents(folder: Path) -> list[str]:
    """Every text of the folder, and Python's help topics, cleaned of WikiText's `<unk>`."""
    documents = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    for path in sorted(folder.glob("*.jsonl")):
        documents += [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    if not documents:
        raise SystemExit(f"{folder}: no .txt and no .jsonl files to train on")
    documents += [text for _, text in sorted(pydoc_data.topics.topics.items())]
    return [re.sub(r" ?<unk>", "", document) for document in documents]


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """The first nineteen twentieths of every document, and the rest."""
    cuts = [len(document) * 19 // 20 for document in documents]
    return [d[:c] for d, c in zip(documents, cuts, strict=True)], [d[c:] for d, c in zip(documents, cuts, strict=True)]


def train_tokenizer(config: Config, texts: list[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE for GPT-2, lower-cased WordPiece for BERT."""
    if isinstance(config, GPT2Config):
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet)
    else:
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=VOCAB, special_tokens=BERT_SPECIALS, limit_alphabet=200)
    tokenizer.train_from_iterator(texts, trainer)
    if isinstance(config, BertConfig):
        ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
        )
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, config: Config, folder: Path) -> None:
    if isinstance(config, GPT2Config):
        about = {"tokenizer_class": "GPT2Tokenizer", "bos_token": END, "eos_token": END, "unk_token": END}
    else:
        about = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
        about |= {f"{token[1:-1].lower()}_token": token for token in BERT_SPECIALS}
    about["model_max_length"] = config.n_positions
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def token_stream(tokenizer: tokenizers.Tokenizer, config: Config, texts: list[str]) -> np.ndarray:
    """All texts' ids in one row, with a separator after each."""
    separator = tokenizer.token_to_id(END if isinstance(config, GPT2Config) else "[SEP]")
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return np.concatenate([np.array([*encoding.ids, separator], np.int32) for encoding in encodings])


def windows(stream: np.ndarray, generator: np.random.Generator, length: int) -> np.ndarray:
    """`TOKENS_A_STEP` tokens as random windows of the stream."""
    starts = generator.integers(0, len(stream) - length, TOKENS_A_STEP // length)
    return stream[starts[:, None] + np.arange(length)]


def mask_tokens(ids: np.ndarray, generator: np.random.Generator, ends: tuple[int, int], mask: int):
    """BERT's task: (corrupted ids, positions to predict, their true ids).

    Half of the windows stand between [CLS] and [SEP]. Of the chosen tokens 80 % become [MASK], 10 %
    a random token, and 10 % stay.
    """
    ids = ids.copy()
    framed = generator.random(len(ids)) < 0.5
    ids[framed, 0], ids[framed, -1] = ends
    count = int(MASKED * ids.shape[1])
    order = generator.random(ids.shape)
    order[:, [0, -1]] = 2  # the ends are never chosen
    chosen = np.argsort(order, axis=1)[:, :count]
    truth = np.take_along_axis(ids, chosen, 1)
    dice = generator.random(truth.shape)
    random = generator.integers(len(BERT_SPECIALS), VOCAB, truth.shape)
    replaced = np.where(dice < 0.8, mask, np.where(dice < 0.9, random, truth)).astype(np.int32)
    np.put_along_axis(ids, chosen, replaced, 1)
    return ids, chosen, truth


def fresh_head(config: Config) -> dict:
    """BERT's masked-token head: dense, GELU, norm, and a bias for the tied output embedding."""
    width = config.n_embd
    dense = np.random.default_rng(0).normal(0, config.initializer_range, (width, width)).astype(np.float32)
    vectors = {
        "dense_bias": np.zeros(width),
        "scale": np.ones(width),
        "shift": np.zeros(width),
        "bias": np.zeros(VOCAB),
    }
    return {"dense": dense} | {name: vector.astype(np.float32) for name, vector in vectors.items()}


def sinusoids(config: Config) -> np.ndarray:
    """Position embeddings to start BERT from, as in Vaswani et al. 2017, in the size of the others.

    From random ones, 256 positions take longer to find their neighbours than this training lasts.
    """
    angles = np.arange(config.n_positions)[:, None] / 10_000 ** (np.arange(0, config.n_embd, 2) / config.n_embd)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return (config.initializer_range * 2**0.5 * waves).astype(np.float32)


def gpt2_loss(params: dict, ids: jax.Array, config: GPT2Config) -> jax.Array:
    """Mean cross-entropy of the next token, in nats."""
    logits = jaxqkv.logits(params["model"], ids, config)[:, :-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


def bert_loss(params: dict, task: tuple, config: BertConfig) -> jax.Array:
    """Mean cross-entropy of the masked tokens, in nats."""
    ids, chosen, truth = task
    head = params["head"]
    x = jnp.take_along_axis(jaxqkv.hidden(params["model"], ids, config), chosen[..., None], 1)
    x = jax.nn.gelu(x @ head["dense"] + head["dense_bias"], approximate=False)
    x = jax.nn.standardize(x, epsilon=config.layer_norm_epsilon) * head["scale"] + head["shift"]
    logits = x @ params["model"]["embed"]["word"]["embedding"].T + head["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, truth).mean()


def head_tensors(head: dict) -> dict[str, np.ndarray]:
    """The masked-token head under the names that `BertForMaskedLM` reads."""
    at = "cls.predictions"
    return {
        f"{at}.transform.dense.weight": head["dense"].T,
        f"{at}.transform.dense.bias": head["dense_bias"],
        f"{at}.transform.LayerNorm.weight": head["scale"],
        f"{at}.transform.LayerNorm.bias": head["shift"],
        f"{at}.bias": head["bias"],
    }


def train(name: str, config: Config, documents: list[str], out: Path, steps: int, seed: int) -> None:
    """Trains one checkpoint, writes it to `out/name` and reports its held-out loss."""
    training, held_out = split(documents)
    tokenizer = train_tokenizer(config, training)
    stream, held_out_stream = (token_stream(tokenizer, config, texts) for texts in (training, held_out))
    print(f"{name}: {len(stream):,} tokens to train on, {len(held_out_stream):,} held out", flush=True)

    work = out / f".{name}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "config.json").write_text(json.dumps(config.to_json()), encoding="utf-8")
    params = {"model": jaxqkv.load(f"random:{work}", seed=seed).params()}
    if isinstance(config, BertConfig):
        params["head"] = fresh_head(config)
        params["model"]["embed"]["position"]["embedding"] = jnp.asarray(sinusoids(config))
    ends = (tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]"))
    loss = gpt2_loss if isinstance(config, GPT2Config) else bert_loss

    def task(source: np.ndarray, generator: np.random.Generator, length: int):
        ids = windows(source, generator, length)
        return ids if loss is gpt2_loss else mask_tokens(ids, generator, ends, tokenizer.token_to_id("[MASK]"))

    schedule = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE[name], min(300, steps // 10), steps, 1e-4)
    decayed = lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)  # noqa: E731
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.1, mask=decayed)
    )
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, task):
        value, gradient = jax.value_and_grad(lambda p: loss(p, task, config))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    evaluate = jax.jit(lambda params, task: loss(params, task, config))

    def held_out_loss(params: dict) -> float:
        generator = np.random.default_rng(seed + 1)
        return float(np.mean([evaluate(params, task(held_out_stream, generator, LENGTH)) for _ in range(16)]))

    counts = np.bincount(stream, minlength=VOCAB) + 1.0
    unigram = float(-np.log(counts / counts.sum())[held_out_stream].mean())
    untrained = held_out_loss(params)
    generator = np.random.default_rng(seed)
    begin = time.monotonic()
    for number in range(steps):
        length = LENGTH // 2 if number < 3 * steps // 4 else LENGTH
        params, state, value = step(params, state, task(stream, generator, length))
        if number % 100 == 0 or number == steps - 1:
            print(f"{name}: step {number:5d}  loss {value:.3f}  {time.monotonic() - begin:.0f} s", flush=True)

    tensors = tensors_from_params(params["model"], config)
    prefix, extra = "transformer.", {}
    if isinstance(config, BertConfig):
        prefix, extra = "bert.", {"architectures": ["BertForMaskedLM"]}
    tensors = {f"{prefix}{key}": tensor for key, tensor in tensors.items()}
    if isinstance(config, BertConfig):
        tensors |= head_tensors(params["head"])
    halves = {key: np.asarray(tensor).astype(np.float16) for key, tensor in tensors.items()}
    save_checkpoint(work, config, halves, dtype="float16", **extra)
    save_tokenizer(tokenizer, config, work)
    shutil.rmtree(out / name, ignore_errors=True)
    work.rename(out / name)
    params["model"] = jaxqkv.load(out / name).params()
    print(
        f"{name}: held-out loss {held_out_loss(params):.3f} nats a token "
        f"(unigram model {unigram:.3f}, untrained {untrained:.3f}) after {steps} steps of {TOKENS_A_STEP} tokens"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with .txt and .jsonl files")
    parser.add_argument("--only", choices=CONFIGS, help="train only this one")
    parser.add_argument("--steps", type=int, default=1800, help="training steps (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=BUNDLED["demo-gpt2"].parent, help="default: jaxqkv/demo")
    arguments = parser.parse_args()
    documents = read_documents(arguments.folder)
    for name, config in CONFIGS.items():
        if arguments.only in (None, name):
            train(name, config, documents, arguments.out, arguments.steps, arguments.seed)


if __name__ == "__main__":
    main()
