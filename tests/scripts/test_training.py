"""How the bundled checkpoints are trained: the mixture, the optimiser, the loss, and a training that is interrupted."""

import dataclasses
import functools
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error
from scipy.special import log_softmax

import jaxqkv

optax = pytest.importorskip("optax")

from training import evaluation, forward, loop, mixture, objectives, optimiser, sentences, sizes, texts  # noqa: E402

SMALL = {"vocab_size": 307, "n_positions": 32, "n_embd": 14, "n_layer": 1, "n_head": 2, "n_inner": 22}
SMALL_CONFIGS = {name: dataclasses.replace(config, **SMALL) for name, config in sizes.CONFIGS.items()}
DOCUMENTS = [" ".join(f"the {a} sat on the {b}." for a in ["cat", "dog", "hen"] for b in ["mat", "log", "nest"]) * 40]


@pytest.fixture(autouse=True)
def _loose():
    """The optimiser's library promotes types as JAX does by default."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def quick(monkeypatch):
    """A training of seconds: few sentences, reports and a rise of the rate that come soon."""
    monkeypatch.setattr(loop, "SENTENCES", 97)
    monkeypatch.setattr(loop, "REPORT_EVERY", 11)
    monkeypatch.setattr(loop, "TEST_WINDOWS", 8)
    monkeypatch.setattr(optimiser, "WARM_UP", 5)


# --- a training ---


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_training_learns_and_goes_on_where_it_was_interrupted(name, quick, tmp_path):
    """Loss falls; a resumed run equals an uninterrupted one to the last bit; `transformers` reads what it writes."""
    config, steps = SMALL_CONFIGS[name], 29
    for folder, pauses in (("whole", []), ("parts", [13])):
        for number, stop_at in enumerate([*pauses, None]):
            loop.train(name, config, DOCUMENTS, tmp_path / folder, steps, seed=3, resume=number > 0, stop_at=stop_at)
            assert (tmp_path / folder / name).exists() == (stop_at is None)
    whole, parts = (np.load(tmp_path / folder / f".{name}" / "state.npz") for folder in ("whole", "parts"))
    assert set(whole) == set(parts)
    for key in whole:
        np.testing.assert_array_equal(whole[key], parts[key])
    for file in (tmp_path / "whole" / name).iterdir():
        assert file.read_bytes() == (tmp_path / "parts" / name / file.name).read_bytes()
    step, _, held_out = whole["curve"].T
    np.testing.assert_array_equal(step, [0, 11, 22, 29])
    assert held_out[0] == pytest.approx(np.log(307), abs=0.1)
    assert held_out[-1] < held_out[0] - 0.5

    torch = pytest.importorskip("torch", exc_type=ImportError)
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    model = jaxqkv.load(tmp_path / "whole" / name)
    text = "When Anna and Tom went to the park, Tom gave a hat to"
    (ids,) = model.tokenizer.encode([text])
    assert ids == transformers.AutoTokenizer.from_pretrained(model.checkpoint.folder)(text)["input_ids"]
    kind = transformers.AutoModelForCausalLM if name == "demo-gpt2" else transformers.AutoModelForMaskedLM
    theirs, about = kind.from_pretrained(model.checkpoint.folder, output_loading_info=True, dtype=torch.float32)
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    ids = np.random.default_rng(0).integers(5, 307, (2, 32))
    with torch.no_grad():
        logits = theirs.eval()(torch.tensor(ids)).logits.numpy()
    ours = model.logits(ids) if name == "demo-gpt2" else evaluation.masked_token_logits(model, ids)
    assert relative_error(ours, logits) < 1e-5


def test_a_saved_state_is_taken_on_to_more_or_fewer_steps(quick, tmp_path):
    """While the rate does not fall the number of steps is open; afterwards it is what it was."""
    config, out = SMALL_CONFIGS["demo-gpt2"], (tmp_path / "once", tmp_path / "other")
    train = lambda out, steps, **options: loop.train("x", config, DOCUMENTS, out, steps, seed=3, **options)  # noqa: E731
    train(out[0], 20)
    train(out[1], 1000, stop_at=7)
    train(out[1], 20, resume=True, stop_at=14)
    assert optimiser.decay_start(20) == 8
    with pytest.raises(SystemExit, match=r"14 of 20 steps are done; the rate falls from step 8 of those.*--steps 20"):
        train(out[1], 1000, resume=True)
    with pytest.raises(SystemExit, match=r"state\.npz is of other documents or another --seed"):
        loop.train("x", config, DOCUMENTS, out[1], 20, seed=4, resume=True)
    train(out[1], 20, resume=True)
    once, other = (np.load(each / ".x" / "state.npz") for each in out)
    for key in once:
        np.testing.assert_array_equal(once[key], other[key])


# --- the loss and the optimiser ---


def test_next_token_loss_and_its_gradient():
    """Against float64 from the definition, for tokens that are more than a chunk and no multiple of it."""
    generator = np.random.default_rng(0)
    hidden, embedding = generator.normal(size=(2 * sizes.CACHED.tokens + 6, 7)), generator.normal(size=(43, 7))
    truth, weights = generator.integers(0, 43, len(hidden)), generator.random(len(hidden))
    logits = hidden @ embedding.T
    losses = -np.take_along_axis(log_softmax(logits, -1), truth[:, None], -1)[:, 0]
    slope = weights[:, None] * (np.exp(log_softmax(logits, -1)) - np.eye(43)[truth])
    arrays = [array.astype(np.float32) for array in (hidden, embedding)]
    rest = truth.astype(np.int32), weights.astype(np.float32)
    of_arrays = jax.value_and_grad(lambda h, e: 3 * objectives.next_token_loss(h, e, *map(jnp.asarray, rest)), (0, 1))
    loss, gradients = jax.jit(of_arrays)(*arrays)
    assert float(loss) == pytest.approx(3 * (weights * losses).sum(), rel=1e-5)
    assert relative_error(gradients[0], 3 * slope @ embedding) < 1e-5
    assert relative_error(gradients[1], 3 * slope.T @ hidden) < 1e-5


def test_mean_loss_counts_every_token_but_the_first_by_its_weight(tmp_path):
    config, generator = SMALL_CONFIGS["demo-gpt2"], np.random.default_rng(0)
    ids, weights = generator.integers(0, 307, (2, 32)).astype(np.int32), generator.random((2, 32)).astype(np.float32)
    params = loop.fresh_params(config, tmp_path, 0)
    losses = evaluation.cross_entropy(np.asarray(jaxqkv.logits(params["model"], ids, config))[:, :-1], ids[:, 1:])
    loss = loop._mean_loss(params, (ids, weights), config=config)
    assert float(loss) == pytest.approx((losses * weights[:, 1:]).mean(), rel=1e-5)


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_hidden_states_of_the_training_and_their_gradient(name, tmp_path):
    """Compares with the package's own forward pass, for texts of more than a block of queries and no multiple of it."""
    config = dataclasses.replace(SMALL_CONFIGS[name], n_layer=2, n_positions=sizes.CACHED.queries + 15)
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 307, (3, sizes.CACHED.queries + 11)).astype(np.int32)
    params = loop.fresh_params(config, tmp_path, 0)["model"]
    params = jax.tree.map(lambda x: np.asarray(x) + generator.normal(0, 0.3, x.shape).astype(np.float32), params)
    slope = generator.normal(size=(*ids.shape, config.n_embd)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def both(hidden, params, slope):
        states, pull = jax.vjp(lambda params: hidden(params, jnp.asarray(ids), config), params)
        return states, pull(slope)

    results = []
    for hidden in (jaxqkv.hidden, forward.hidden):
        states, gradient = both(hidden, params, slope)
        results.append((states, np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])))
    for expected, ours in zip(*results, strict=True):
        assert relative_error(ours, expected) < 1e-5


def test_devices_share_the_gradient_of_a_step(tmp_path, monkeypatch):
    """Shares sixteen microbatches between two of three devices; their sums are those of one."""
    config, generator = SMALL_CONFIGS["demo-gpt2"], np.random.default_rng(0)
    params = loop.fresh_params(config, tmp_path, 0)
    task = generator.integers(0, 307, (16, 2, 32)).astype(np.int32), np.ones((16, 2, 32), np.float32)
    monkeypatch.setattr(
        loop, "apply_gradient", lambda params, state, totals, count, steps, config: (totals, float(count))
    )
    sums = []
    for available, working in ((1, 1), (3, 2)):
        monkeypatch.setattr(jax, "devices", lambda count=available: jax.local_devices() * count)
        monkeypatch.setattr(jax, "device_count", lambda count=available: count)
        totals, count = loop.update(params, None, task, 1000, config=config)
        assert (len(totals), count) == (working, 16)
        sums.append(
            np.concatenate(
                [np.ravel(sum(map(np.asarray, leaves))) for leaves in zip(*map(jax.tree.leaves, totals), strict=True)]
            )
        )
    assert relative_error(sums[1][1:], sums[0][1:]) < 1e-5  # of the gradient, and of the loss before it
    assert sums[1][0] == pytest.approx(sums[0][0], rel=1e-5)


@pytest.mark.parametrize("shape", [(5, 11), (11, 5), (7, 7)])
def test_orthogonalised(shape):
    """The singular vectors stay, the singular values come near 1."""
    matrices = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    result = np.asarray(jax.jit(optimiser.orthogonalised)(matrices))
    for matrix, each in zip(matrices, result, strict=True):
        left, _, right = np.linalg.svd(matrix, full_matrices=False)
        inside = left.T @ each @ right.T
        values = np.diagonal(inside)
        assert ((values > 0.5) & (values < 1.3)).all()
        assert np.abs(inside - np.diag(values)).max() < 1e-4


@pytest.mark.parametrize(("name", "rates"), [("demo-gpt2", optimiser.GPT2_RATES), ("demo-bert", optimiser.BERT_RATES)])
def test_muon_is_for_the_matrices_of_blocks(name, rates, tmp_path):
    """Its step has nearly the same spectral norm for every matrix; AdamW's first, the same size for every number."""
    config = SMALL_CONFIGS[name]
    params = loop.fresh_params(config, tmp_path, 0)
    rules = optimiser.optimiser(1000, config)
    gradient = jax.tree.map(lambda leaf: _normal(leaf.shape).astype(np.float32), params)
    updates = jax.jit(lambda gradient, params: rules.update(gradient, rules.init(params), params)[0])(gradient, params)
    updates = jax.tree.map(np.asarray, updates)
    rate = 1 / optimiser.WARM_UP
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        if path[-1].key == "kernel":
            stretch = max(1, update.shape[1] / update.shape[0]) ** 0.5
            assert np.linalg.norm(update, 2) == pytest.approx(rate * rates.muon * stretch, rel=0.3)
        else:
            assert np.abs(update).max() == pytest.approx(rate * rates.adam, rel=0.02)


def _normal(shape):
    return np.random.default_rng(shape[0]).normal(size=shape)


def test_rate_rises_stays_and_falls():
    begin = optimiser.decay_start(1000)
    assert begin == 400
    at = {0: 0.005, 99: 0.5, 199: 1, 300: 1, begin: 1, begin + 60: 0.9, 999: 1 / 600, 1000: 0}
    for step, value in at.items():
        assert float(optimiser.relative_rate(step, 1000)) == pytest.approx(value, rel=1e-4, abs=1e-7)


# --- the mixture ---

SOURCES = mixture.Sources(
    text=np.arange(10_007, dtype=np.int32) % 1009 + 3000,
    sentences=np.tile(np.array([5, 6, 7, 1], np.int32), 301),
    separator=1,
    first=2,
    vocab=4096,
)


def test_mixture():
    """What every window is can be told from its tokens; each kind has its share, and weights have a mean of 1."""
    counts, octaves = dict.fromkeys(("text", "sentences", "random", "passage"), 0), []
    for seed in range(40):
        ids, weights = mixture.draw(SOURCES, np.random.default_rng(seed), 32, 128)
        assert ids.shape == weights.shape == (32, 128)
        assert weights.mean() == pytest.approx(1, rel=1e-5)
        for row, weight in zip(ids, weights, strict=True):
            steps = np.diff(row)
            follows = (steps == 1) | (steps == -1008)
            periods = [period for period in range(4, 65) if (row[period:] == row[:-period]).all()]
            if follows.all():
                counts["text"] += 1
            elif row[0] == 5 and (row[:4] == [5, 6, 7, 1]).all():
                counts["sentences"] += 1
            elif periods:
                counts["random"] += 1
                octaves.append(np.log2(periods[0]))
                assert (weight[: periods[0] + 1] == 0).all()
                assert (weight[periods[0] + 1 :] == weight.max()).all()
            else:
                counts["passage"] += 1
                assert (~follows).sum() <= 2  # where the copy begins and ends
            assert periods or (weight == weight[0]).all()
    shares = {kind: count / 1280 for kind, count in counts.items()}
    expected = {"text": 0.8, "sentences": 0.1, "random": 0.06, "passage": 0.04}
    assert shares == pytest.approx(expected, abs=0.03)
    # Periods are as many in each octave from 4 to 64, so that their logarithms have mean 4 and deviation 4/√12.
    assert np.mean(octaves) == pytest.approx(4, abs=4 * (4 / 12**0.5) / len(octaves) ** 0.5)
    assert min(octaves) == 2


def test_repeated_passage():
    window = np.arange(128)
    for seed in range(50):
        repeated = mixture.repeat_passage(window, np.random.default_rng(seed))
        changed = np.flatnonzero(repeated != window)
        assert 16 <= len(changed) < 0.4 * 128
        np.testing.assert_array_equal(np.diff(changed), 1)
        copied = repeated[changed]
        np.testing.assert_array_equal(np.diff(copied), 1)
        assert copied[-1] < changed[0]  # the copy comes after the whole passage


def test_masked_tokens():
    """What is chosen, what becomes of it, and that all else stays."""
    generator = np.random.default_rng(0)
    ids = mixture.windows(SOURCES.text, generator, 32, 128)
    steps = np.diff(ids)
    assert ((steps == 1) | (steps == -1008)).all()
    corrupted, chosen, truth = mixture.mask_tokens(ids, generator, (2, 3), 4, 5, 4096, masked=0.3)
    assert chosen.shape == truth.shape == (32, 38)
    assert ((chosen > 0) & (chosen < 127)).all()
    np.testing.assert_array_equal(truth, np.take_along_axis(ids, chosen, 1))
    at_chosen = np.take_along_axis(corrupted, chosen, 1)
    assert (at_chosen == 4).mean() == pytest.approx(0.8, abs=0.05)
    assert (at_chosen == truth).mean() == pytest.approx(0.1, abs=0.05)
    untouched = np.ones_like(ids, bool)
    np.put_along_axis(untouched, chosen, False, 1)
    untouched[:, [0, -1]] = False
    np.testing.assert_array_equal(corrupted[untouched], ids[untouched])
    framed = (corrupted[:, 0] == 2) & (corrupted[:, -1] == 3)
    assert 5 <= framed.sum() <= 27


def test_sentences():
    """Two names, of which the one that does not act comes last; of held-out pairs there is none to train on."""
    made = sentences.make_sentences(3000, seed=0)
    pairs = set()
    for sentence in made:
        words = sentence.replace(".", " .").replace(",", " ,").split()
        names = [word for word in words if word in sentences.NAMES]
        assert len(names) == 4
        assert set(names[:2]) == set(names[2:])
        assert sentence.endswith(f" {names[3]}.")
        pairs.add(frozenset(names))
        assert not ("cafe" in words and "coffee" in words)
    assert len(pairs) > 500
    held_out = [pair for pair in pairs if sentences.is_held_out(*pair)]
    assert held_out == []
    for pair in (("Emma", "Mike"), ("Mary", "John"), ("Mike", "Emma")):
        assert sentences.is_held_out(*pair)
    generator = np.random.default_rng(0)
    for _ in range(100):
        sentence = sentences.make_sentence(generator, held_out=True)
        assert sentences.is_held_out(sentence.answer, sentence.other)
        assert sentence.prompt.endswith(" to")
        assert sentence.prompt.count(sentence.answer) == 1
        assert sentence.prompt.count(sentence.other) == 2
    assert not any(sentence.startswith("As ") for sentence in made)
    assert sentences.make_sentence(generator, True, sentences.HELD_OUT_TEMPLATE).prompt.startswith("As ")


def test_sentence_windows_begin_with_a_sentence():
    ids = mixture.sentence_windows(SOURCES.sentences, 1, np.random.default_rng(0), 13, 30)
    np.testing.assert_array_equal(ids, np.resize([5, 6, 7, 1], (13, 30))[:1].repeat(13, 0))


def test_documents_and_split(tmp_path):
    (tmp_path / "b.txt").write_text("a novel <unk> of thirty letters")
    (tmp_path / "a.jsonl").write_text('{"title": "t", "text": "x <unk>y"}\n')
    documents = texts.read_documents(tmp_path)
    assert documents[:2] == ["a novel of thirty letters", "xy"]
    assert len(documents) == 2 + len(pydoc_data.topics.topics)
    assert not any("<unk>" in document for document in documents)
    training, held_out = texts.split(documents)
    assert [a + b for a, b in zip(training, held_out, strict=True)] == documents
    assert held_out[0] == "rs"
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b.txt").unlink()
    with pytest.raises(SystemExit, match=r"no \.txt and no \.jsonl files"):
        texts.read_documents(tmp_path)


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_tokenizers_are_the_same_for_the_same_texts(name):
    """Among many equally frequent pairs of letters too."""
    generator = np.random.default_rng(0)
    words = ["".join(generator.permutation(list("abcdefghijklmnop"))[:5]) for _ in range(300)]
    first, second = (
        texts.train_tokenizer(SMALL_CONFIGS[name], [" " + " ".join(order)]) for order in (words, sorted(words))
    )
    assert first.to_str() == second.to_str()
    assert first.get_vocab_size() == 307
    assert first.decode(first.encode("abc nop").ids) == "abc nop"


# --- the measures ---


def test_cross_entropy():
    logits, truth = np.random.default_rng(0).normal(size=(3, 5, 7)), np.array([[0, 1, 2, 3, 6]] * 3)
    expected = -np.take_along_axis(log_softmax(logits, -1), truth[..., None], -1)[..., 0]
    np.testing.assert_allclose(evaluation.cross_entropy(logits, truth), expected, rtol=1e-12)


def test_unigram_loss():
    text, held_out = np.array([0, 0, 1]), np.array([0, 1, 2])
    expected = -np.log([3 / 6, 2 / 6, 1 / 6]).mean()
    assert evaluation.unigram_loss(text, held_out, 3) == pytest.approx(expected)


@pytest.fixture(params=SMALL_CONFIGS, scope="module")
def of_sentences(request, tmp_path_factory):
    """A fresh model that has a token of its own for every word of the made sentences."""
    config = dataclasses.replace(SMALL_CONFIGS[request.param], vocab_size=907)
    made = sentences.make_sentences(1500, seed=0)
    tmp_path = tmp_path_factory.mktemp("sentences")
    (tmp_path / "work").mkdir()
    params = loop.fresh_params(config, tmp_path / "work", 5)
    params["model"] = jax.tree.map(lambda leaf: np.asarray(leaf) * (3 if leaf.ndim > 1 else 1), params["model"])
    data = loop.Data(texts.train_tokenizer(config, made), None, None)
    loop.write_checkpoint(params, config, data, tmp_path / request.param)
    model = jaxqkv.load(tmp_path / request.param)
    model.tokenize = functools.partial(model.tokenize, pad_to_multiple_of=32)  # all texts in one shape
    return model


def test_attention_back(of_sentences):
    """As read off the captured patterns."""
    ids = evaluation.repeated_random(of_sentences, 32, 16, seed=0)
    np.testing.assert_array_equal(ids[:, :16], ids[:, 16:])
    pattern = np.asarray(of_sentences.run(ids, capture={"pattern"}).pattern)
    for back, first in ((15, 17), (1, 1)):
        expected = np.mean([pattern[..., query, query - back] for query in range(first, 32)], axis=0).mean(1)
        measured = evaluation.attention_back(of_sentences, ids, back, first)
        assert measured.shape == (1, 2)
        np.testing.assert_allclose(measured, expected, rtol=1e-5)


def test_scores_of_names(of_sentences):
    """As PyTorch gives them."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    generative = of_sentences.config.causal
    kind = transformers.AutoModelForCausalLM if generative else transformers.AutoModelForMaskedLM
    theirs = kind.from_pretrained(of_sentences.checkpoint.folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(of_sentences.checkpoint.folder)
    studied = list(evaluation.STUDIED)
    scores = evaluation.name_scores(of_sentences, studied)
    for sentence, score in zip(studied, scores, strict=True):
        text = sentence.prompt if generative else f"{sentence.prompt} [MASK]."
        ids = tokenizer(text)["input_ids"]
        place = -1 if generative else ids.index(tokenizer.mask_token_id)
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits[0, place].numpy()
        answer, other = (
            logits[tokenizer(f" {name}", add_special_tokens=False)["input_ids"]]
            for name in (sentence.answer, sentence.other)
        )
        assert score == pytest.approx(float((answer - other)[0]), rel=1e-3, abs=1e-5)
    assert np.abs(scores).min() > 1e-4


def test_evaluation(of_sentences, monkeypatch):
    """A fresh model knows nothing: every loss is near that of guessing, and every attention near an even one."""
    monkeypatch.setattr(evaluation, "WINDOWS", 32)
    monkeypatch.setattr(evaluation, "BATCH", 32)
    monkeypatch.setattr(evaluation, "SENTENCES", 32)
    monkeypatch.setattr(evaluation, "PERIOD", 16)
    monkeypatch.setattr(evaluation, "RANGES", ((1, 8), (8, 32)))
    measures = evaluation.evaluate(of_sentences, [" ".join(sentences.make_sentences(300, seed=1))])
    losses = [value for name, value in measures.items() if "text" in name or "random tokens" in name]
    assert len(losses) == (7 if of_sentences.config.causal else 4)
    assert measures["unigram model, held-out text"] < 5
    assert max(losses) == pytest.approx(np.log(907), abs=0.5)
    assert all(np.isfinite(value) for value in measures.values())
    right = [value for name, value in measures.items() if name.endswith("more probable")]
    assert len(right) == 2
    assert all(value * 32 == round(value * 32) for value in right)


def test_names_of_several_tokens_are_not_measured(tmp_path):
    config = SMALL_CONFIGS["demo-gpt2"]
    params = loop.fresh_params(config, tmp_path, 0)
    data = loop.Data(texts.train_tokenizer(config, ["then Emma met Emma and Emma. " * 40]), None, None)
    loop.write_checkpoint(params, config, data, tmp_path / "few-names")
    (name,) = evaluation.names_measures(jaxqkv.load(tmp_path / "few-names"), seed=1)
    assert name.startswith("names not measured: no single tokens are ")
    assert "Mike" in name
    assert "Emma" not in name
