"""The training loop, which can be interrupted and resumed without a change of the numbers."""

import functools
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers

import jaxqkv
from jaxqkv.architectures.bert import BertConfig
from jaxqkv.architectures.gpt2 import GPT2Config
from jaxqkv.checkpoints.config import Config
from jaxqkv.checkpoints.folder import save_checkpoint, tensors_from_params
from training.mixture import MASKED, Sources, draw, mask_tokens, windows
from training.objectives import fresh_head, head_tensors, mean_loss, sinusoids
from training.optimiser import decay_start, optimiser
from training.sentences import make_sentences
from training.sizes import BERT_SPECIALS, WINDOWS, blocks
from training.texts import save_tokenizer, separator, split, token_stream, train_tokenizer

SENTENCES = 20_000  # made sentences for the tokenizer and the mixture
MASKED_IN_TESTS = 0.15  # as in Devlin et al. 2018
REPORT_EVERY, TEST_WINDOWS = 250, 64


class Data(NamedTuple):
    """Data of one model: its tokenizer, sources of training windows, and held-out text in a row."""

    tokenizer: tokenizers.Tokenizer
    sources: Sources
    held_out: np.ndarray


class State(NamedTuple):
    """State of a training between two steps: steps done and in all, parameters, optimiser's state, curve.

    Attributes:
      recent: losses of the steps since the last report, still on the device.
      curve: `[reports, 3]`: step, mean of those losses, held-out loss.
    """

    step: int
    steps: int
    params: Any
    optimiser: Any
    recent: tuple[Any, ...]
    curve: np.ndarray


def prepare(config: Config, documents: list[str], work: Path, seed: int) -> Data:
    """Returns the data; the tokenizer is trained, or read if `work` already has it."""
    training, held_out = split(documents)
    sentences = make_sentences(SENTENCES, seed)
    if (work / "tokenizer.json").exists():
        tokenizer = tokenizers.Tokenizer.from_file(str(work / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(config, [*training, *sentences])
        save_tokenizer(tokenizer, config, work)
    text, made, rest = (token_stream(tokenizer, config, texts) for texts in (training, sentences, held_out))
    first = 1 if isinstance(config, GPT2Config) else len(BERT_SPECIALS)
    sources = Sources(text, made, separator(tokenizer, config), first, config.vocab_size)
    return Data(tokenizer, sources, rest)


def make_task(config: Config, data: Data, ids: np.ndarray, weights: np.ndarray, generator: np.random.Generator,
              masked: float = MASKED) -> tuple[np.ndarray, ...]:  # fmt: skip
    """Returns a task for `mean_loss` from windows."""
    if isinstance(config, GPT2Config):
        return ids, weights
    cls, sep, mask = (data.tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]", "[MASK]"))
    return mask_tokens(ids, generator, (cls, sep), mask, data.sources.first, config.vocab_size, masked)


def task_of_step(config: Config, data: Data, seed: int, step: int) -> tuple[np.ndarray, ...]:
    """Returns the task of a step in microbatches, which depends only on the arguments."""
    generator = np.random.default_rng((seed, step))
    ids, weights = draw(data.sources, generator, WINDOWS, config.n_positions)
    task = make_task(config, data, ids, weights, generator)
    return jax.tree.map(lambda array: array.reshape(-1, blocks().windows, *array.shape[1:]), task)


def fresh_params(config: Config, work: Path, seed: int) -> Any:
    """Returns freshly initialised `{"model": …}` of that config, and for BERT its `head`."""
    (work / "config.json").write_text(json.dumps(config.to_json()), encoding="utf-8")
    params: dict[str, Any] = {"model": jaxqkv.load(f"random:{work}", seed=seed).params()}
    if isinstance(config, BertConfig):
        params["head"] = jax.tree.map(jnp.asarray, fresh_head(config))
        params["model"]["embed"]["position"]["embedding"] = jnp.asarray(sinusoids(config))
    return params


@functools.partial(jax.jit, static_argnames="config")
def gradient(params: Any, task: Any, *, config: Config) -> tuple[jax.Array, Any]:
    """Returns the sums of loss and gradient over the microbatches of a task."""

    def add(total: Any, microbatch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(mean_loss)(params, microbatch, config)), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zeros, task)[0]


@functools.partial(jax.jit, donate_argnames=("params", "state"), static_argnames="config")
def apply_gradient(
    params: Any, state: Any, totals: Any, count: Any, steps: Any, *, config: Config
) -> tuple[Any, Any, jax.Array]:
    """Returns parameters and the optimiser's state after a step, and the mean loss before it.

    Args:
      params, state: before the step.
      totals: what `gradient` returns, for each device.
      count: microbatches in all.
      steps: of the whole training.
      config: of the model.
    """
    loss, mean = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]) / count, *totals)
    updates, state = optimiser(steps, config).update(mean, state, params)
    return optax.apply_updates(params, updates), state, loss


def update(params: Any, state: Any, task: Any, steps: Any, *, config: Config) -> tuple[Any, Any, jax.Array]:
    """Makes one step, the microbatches shared out evenly to as many devices as possible, which work side by side.

    Returns:
      Parameters and the optimiser's state after it, and the loss before it.
    """
    count = len(jax.tree.leaves(task)[0])
    devices = jax.devices()[: max(n for n in range(1, jax.device_count() + 1) if count % n == 0)]
    share, totals = count // len(devices), []
    for index, device in enumerate(devices):
        part = jax.tree.map(lambda array: array[index * share : (index + 1) * share], task)  # noqa: B023
        totals.append(gradient(*jax.device_put((params, part), device), config=config))
    totals = jax.device_put(totals, devices[0])
    return apply_gradient(params, state, totals, np.float32(count), steps, config=config)


_mean_loss = jax.jit(mean_loss, static_argnames="config")


def held_out_loss(params: Any, config: Config, data: Data, seed: int) -> float:
    """Returns the mean loss of held-out text, in nats; for BERT with 15 % masked."""
    generator = np.random.default_rng(seed + 1)
    ids = windows(data.held_out, generator, TEST_WINDOWS, config.n_positions)
    task = make_task(config, data, ids, np.ones(ids.shape, np.float32), generator, MASKED_IN_TESTS)
    pieces = [
        jax.tree.map(lambda array: array[start : start + blocks().windows], task)  # noqa: B023
        for start in range(0, TEST_WINDOWS, blocks().windows)
    ]
    return float(np.mean([_mean_loss(params, piece, config=config) for piece in pieces]))


def save_state(path: Path, state: State, source: np.ndarray) -> None:
    """Writes the state and its source (seed and sums over the tokens); the file is never incomplete."""
    leaves = jax.tree.leaves((state.params, state.optimiser))
    arrays = {f"leaf_{index}": np.asarray(leaf) for index, leaf in enumerate(leaves)}
    part = path.with_suffix(".part.npz")
    np.savez(
        part,
        step=state.step,
        steps=state.steps,
        recent=np.array(state.recent),
        curve=state.curve,
        source=source,
        **arrays,
    )
    os.replace(part, path)


def load_state(path: Path, like: State, source: np.ndarray) -> State:
    """Reads a state of the same shapes as `like`, to go on to its number of steps.

    Raises:
      SystemExit: if its source is not `source`, or if the number of steps differs from the state's own and the
        learning rate of either already falls.
    """
    with np.load(path, allow_pickle=False) as file:
        if not np.array_equal(file["source"], source):
            raise SystemExit(f"{path} is of other documents or another --seed; without --resume it begins anew")
        step, steps = int(file["step"]), int(file["steps"])
        if steps != like.steps and step > min(decay_start(steps), decay_start(like.steps)):
            raise SystemExit(
                f"{path}: {step} of {steps} steps are done; the rate falls from step {decay_start(steps)} of those, "
                f"and from step {decay_start(like.steps)} of {like.steps}: --steps {steps} goes on"
            )
        leaves, tree = jax.tree.flatten((like.params, like.optimiser))
        leaves = [jnp.asarray(file[f"leaf_{index}"]) for index in range(len(leaves))]
        params, moments = jax.tree.unflatten(tree, leaves)
        return State(step, like.steps, params, moments, tuple(file["recent"]), file["curve"])


def write_checkpoint(params: Any, config: Config, data: Data, folder: Path) -> None:
    """Writes config, float16 weights and tokenizer in Hugging Face's format."""
    tensors = tensors_from_params(params["model"], config)
    prefix, extra = "transformer.", {}
    if isinstance(config, BertConfig):
        prefix, extra = "bert.", {"architectures": ["BertForMaskedLM"]}
    tensors = {f"{prefix}{key}": tensor for key, tensor in tensors.items()}
    if isinstance(config, BertConfig):
        tensors |= head_tensors(params["head"])
    halves = {key: np.asarray(tensor).astype(np.float16) for key, tensor in tensors.items()}
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    save_checkpoint(part, config, halves, dtype="float16", **extra)
    save_tokenizer(data.tokenizer, config, part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def train(name: str, config: Config, documents: list[str], out: Path, steps: int, *, seed: int = 0,
          resume: bool = False, save_minutes: float = 5, stop_at: int | None = None) -> None:  # fmt: skip
    """Trains one checkpoint, and writes it to `out/name`; its state stays in `out/.name`.

    Args:
      name: of the checkpoint.
      config: of the model.
      documents: texts to train on.
      out: folder for the checkpoint.
      steps: in all.
      seed: of fresh weights and windows.
      resume: whether to continue from the saved state.
      save_minutes: minutes between two saved states.
      stop_at: the step at which to save the state and end early.
    """
    work = out / f".{name}"
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    data = prepare(config, documents, work, seed)
    tokens, rest = len(data.sources.text), len(data.held_out)
    print(f"{name}: {tokens:,} tokens of text to train on, {rest:,} held out", flush=True)
    params = fresh_params(config, work, seed)
    state = State(0, steps, params, optimiser(steps, config).init(params), (), np.zeros((0, 3)))
    path = work / "state.npz"
    source = np.array([seed, *(int(stream.sum(dtype=np.int64)) for stream in (data.sources.text, data.held_out))])
    if resume and path.exists():
        state = load_state(path, state, source)
    elif resume:
        print(f"{name}: no {path} to resume from: it begins at the beginning", flush=True)
    # On the device that later states are on, so that each program is compiled once.
    params, moments = jax.device_put((state.params, state.optimiser), jax.devices()[0])
    state = state._replace(params=params, optimiser=moments)
    begin = saved = time.monotonic()
    first = state.step
    while True:
        if state.step == steps or state.step % REPORT_EVERY == 0:
            state = report(name, state, held_out_loss(state.params, config, data, seed))
            print(f"  {(time.monotonic() - begin) / max(1, state.step - first):.2f} s a step", flush=True)
        if state.step in (steps, stop_at) or time.monotonic() - saved > 60 * save_minutes:
            save_state(path, state, source)
            saved = time.monotonic()
        if state.step in (steps, stop_at):
            break
        task = task_of_step(config, data, seed, state.step)
        jax.block_until_ready(state.recent[-1:])  # a task is drawn while the step before it is computed
        params, moments, loss = update(state.params, state.optimiser, task, np.int32(steps), config=config)
        state = State(state.step + 1, steps, params, moments, (*state.recent, loss), state.curve)
    if state.step == steps:
        write_checkpoint(state.params, config, data, out / name)


def report(name: str, state: State, held_out: float) -> State:
    """Prints the losses and adds them to the state's curve, once a step."""
    if len(state.curve) and state.curve[-1, 0] == state.step:
        return state
    loss = np.mean(state.recent) if state.recent else np.nan
    trained = f"loss {loss:.3f}  " if state.recent else ""
    print(f"{name}: step {state.step:5d}  {trained}held out {held_out:.3f} nats", flush=True)
    return state._replace(recent=(), curve=np.vstack([state.curve, [state.step, loss, held_out]]))
