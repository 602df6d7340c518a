"""Study 11: every array of every figure against PyTorch with hooks, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import BERT, GPT2, changed, figures_of, random_tensors, write_folder, write_word_tokenizer
from helpers.checkpoints import WORDS
from helpers.spoilt import check_spoilt_run
from helpers.studies import displayed

import jaxqkv
from jaxqkv import edits
from jaxqkv.checkpoints.checkpoint import BUNDLED
from jaxqkv.cli.main import main
from jaxqkv.errors import JaxqkvError
from jaxqkv.studies import head_patching, pairs
from jaxqkv.studies.head_patching import STUDY
from jaxqkv.studies.options import from_keywords
from jaxqkv.studies.registry import study

torch = pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("transformers", exc_type=ImportError)
from helpers.hooks import hooked  # noqa: E402

from jaxqkv.model import torch_reference  # noqa: E402

CONFIG = changed(GPT2, initializer_range=0.2)
# The second pair is shorter, so that its batch has pads.
PAIRS = [
    ("a cat saw her run home", "a her cat her run saw", " her", " home"),
    ("a her saw her", "home her run her", " her", " cat"),
]
LAYER, SHAPE = 2, (3, 5)
HEADS = list(np.ndindex(SHAPE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_word_tokenizer(write_folder(tmp_path_factory.mktemp("model") / "tiny", CONFIG), WORDS)


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """The options of a run of both pairs."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    path.write_text("\n".join("\t".join(pair) for pair in PAIRS) + "\n")
    return ["--pairs", str(path), "--layer", str(LAYER), "--repeats", "2"]


@pytest.fixture(scope="module")
def arrays(folder, line, tmp_path_factory):
    """The figures of both pairs."""
    return figures_of("head-patching", tmp_path_factory.mktemp("both"), folder, *line)


class Hooked:
    """The model in PyTorch: logits of the last position and z of a text, of several runs with a head's z changed."""

    def __init__(self, folder):
        self.model = jaxqkv.load(folder)
        theirs = torch_reference.build(CONFIG, seed=0)
        tensors = {key: torch.tensor(x) for key, x in random_tensors(CONFIG).items()}
        theirs.transformer.load_state_dict(tensors, strict=False)
        self.theirs = torch_reference.double(theirs)
        self.unchanged = {}

    def __call__(self, text):
        """Returns the last logits, and z `[layer, head, pos, head_dim]`, unchanged."""
        if text not in self.unchanged:
            (logits,), z = self.changed(text, [None], [None])
            self.unchanged[text] = logits, z[:, 0]
        return self.unchanged[text]

    def changed(self, text, at, new, pos=slice(None)):
        """Returns both of a run for each of `at`, `[run, …]`: in run i, that head gets the values `new[i]` at `pos`."""
        ids, z = np.repeat(self.model.tokenize(text).ids, len(at), axis=0), []

        def change(field, layer, value):
            if field != "z":
                return None
            z.append(value)
            value = value.copy()
            for row, head in enumerate(at):
                if head is not None and head[0] == layer:
                    value[row, head[1], pos] = new[row][pos]
            return value

        logits = hooked(self.theirs, CONFIG, ids, np.ones(ids.shape, bool), change)["logits"][:, -1]
        return logits, np.stack(z)


@pytest.fixture(scope="module")
def run(folder):
    return Hooked(folder)


def score(logits, pair):
    return logits[..., WORDS.index(pair[2])] - logits[..., WORDS.index(pair[3])]


def patched(run, pair, pos=slice(None)):
    """ΔIOI of every head with z from the donor."""
    z, before = run(pair[1])[1], score(run(pair[0])[0], pair)
    logits, _ = run.changed(pair[0], HEADS, [z[at] for at in HEADS], pos)
    return (score(logits, pair) - before).reshape(SHAPE)


def test_both_texts(arrays, run):
    for side, name in enumerate(("clean", "donor")):
        logits = [run(pair[side])[0] for pair in PAIRS]
        np.testing.assert_allclose(arrays["1"][name], scipy.special.log_softmax(logits[0]), atol=1e-4)
        mean = np.mean([score(each, pair) for each, pair in zip(logits, PAIRS, strict=True)])
        assert arrays["1"][f"score_{name}"] == pytest.approx(mean, abs=1e-4)


def test_shuffled_heads(arrays, run):
    """Pads stay where they are."""
    lengths, changes, norms = (6, 4), [], []
    mask = np.arange(6) < np.array(lengths)[:, None]
    numbers = np.broadcast_to(np.arange(42, dtype=np.float32).reshape(6, 7), (2, 5, 6, 7))
    shuffle = jax.jit(lambda key, layer: edits.permute(key).placed("z", CONFIG, mask.shape).at(layer)(
        jnp.asarray(numbers), edits.Site(layer, jnp.asarray(mask), None)))  # fmt: skip
    # [repeat, layer, pair, head, pos, head_dim]
    orders = np.array([[shuffle(jax.random.key(seed), layer) for layer in range(SHAPE[0])] for seed in (0, 1)], int)
    for index, (pair, length) in enumerate(zip(PAIRS, lengths, strict=True)):
        logits, z = run(pair[0])
        norms.append(np.sqrt((z**2).sum((2, 3))))
        for of_pair in orders[:, :, index, :, :length]:
            new = [z[at].ravel()[of_pair[at].ravel()].reshape(length, 7) for at in HEADS]
            found, _ = run.changed(pair[0], HEADS, new)
            changes.append((score(found, pair) - score(logits, pair)).reshape(SHAPE))
    np.testing.assert_allclose(arrays["2"]["delta"], np.mean(changes, axis=0), atol=1e-4)
    np.testing.assert_allclose(arrays["2"]["norm"], np.mean(norms, axis=0), rtol=1e-4)


def test_z_of_the_donor(arrays, run):
    """Of the first pair."""
    z = run(PAIRS[0][1])[1]
    np.testing.assert_allclose(arrays["3a"]["z"], z[LAYER].swapaxes(0, 1), atol=1e-5)
    np.testing.assert_allclose(arrays["3b"]["norm"], np.linalg.norm(z, axis=-1).mean(1), rtol=1e-4)
    difference = z[:, :, 1] - z[:, :, 3]  # both " her"
    np.testing.assert_allclose(arrays["4"]["difference"], difference, atol=1e-5)
    sizes = np.sort(np.abs(difference).mean(-1), axis=1)
    np.testing.assert_allclose(arrays["4"]["ratio"], sizes[:, 3:].mean(1) / sizes[:, :2].mean(1), rtol=1e-3)


def test_patched_heads(arrays, run):
    several, found = np.stack([patched(run, pair) for pair in PAIRS]), arrays["5"]
    np.testing.assert_allclose(found["delta"], several.mean(0), atol=1e-4)
    gap = arrays["1"]["score_donor"] - arrays["1"]["score_clean"]
    np.testing.assert_allclose(found["recovered"], found["delta"] / gap, rtol=1e-4)
    # Of two pairs the resampled means are the smaller, the larger or between: the interval is from one to the other.
    np.testing.assert_allclose(found["low"], several.min(0), atol=1e-4)
    np.testing.assert_allclose(found["high"], several.max(0), atol=1e-4)


def test_one_pair_has_no_interval(folder, run):
    clean, donor, answers = pairs.Pair(*PAIRS[0][:2], PAIRS[0][2:])
    given = {"model": folder, "clean": clean, "donor": donor, "answers": answers}
    values, scores = patched(run, PAIRS[0]), [score(run(text)[0], PAIRS[0]) for text in (clean, donor)]
    with STUDY.start(from_keywords(STUDY.options, given, STUDY.name)) as of_one:
        of_one.score_clean, of_one.score_donor = np.array(scores)[:, None]
        found = STUDY.figures["5"].display(of_one, {"patched": values[None]})
    assert set(found.arrays) == {"delta", "recovered"}
    np.testing.assert_allclose(found.arrays["delta"], values)
    np.testing.assert_allclose(found.arrays["recovered"], values / (scores[1] - scores[0]))
    assert found.caption.endswith(" One pair of sentences proves little; --pairs averages over many.")


def test_each_position(arrays, run):
    """Of the last, a pad of the second pair, the first pair's alone."""
    for pos, real in ((0, PAIRS), (3, PAIRS), (5, PAIRS[:1])):
        expected = np.mean([patched(run, pair, slice(pos, pos + 1)) for pair in real], axis=0)
        np.testing.assert_allclose(arrays["5-positions"]["delta"][:, :, pos], expected, atol=1e-4)


def test_a_whole_run_with_weights_that_are_not_finite(line, tmp_path):
    bars = {"branches": [1 + 2 + 3] * 4}
    check_spoilt_run(tmp_path, "head-patching", CONFIG, WORDS, *line, not_drawn=(), bars=bars)


def test_the_bundled_checkpoint_has_its_own_pair_however_it_is_named(folder, monkeypatch):
    tokenizer = jaxqkv.load("demo-gpt2").tokenizer
    clean, donor = tokenizer.encode(pairs.DEMO_PAIR[:2])
    assert len(clean) == len(donor)
    assert len(set(pairs.answer_tokens(tokenizer, pairs.DEMO_PAIR.answers))) == 2
    own = pairs.Pair(*PAIRS[0][:2], PAIRS[0][2:])
    given = displayed(STUDY, "1", model=folder, **own._asdict())
    monkeypatch.setitem(BUNDLED, "demo-gpt2", folder)
    monkeypatch.setattr(pairs, "DEMO_PAIR", own)
    for named in ({"demo": True}, {"model": "demo-gpt2"}, {"model": folder}):
        figure = displayed(STUDY, "1", **named)
        assert f"after {PAIRS[0][0]!r} (clean) and {PAIRS[0][1]!r} (donor)" in figure.caption
        for name, values in given.arrays.items():
            np.testing.assert_array_equal(figure.arrays[name], values)


def test_refusals(folder, tmp_path, capsys):
    def refuse(message, id="5", **options):
        given = {"clean": PAIRS[0][0], "donor": PAIRS[0][1], "answers": PAIRS[0][2:]} | options
        with pytest.raises(JaxqkvError, match=message):
            head_patching.figure(id, model=folder, **{key: value for key, value in given.items() if value})

    refuse(r"the same number of tokens, not 6 and 2: 'a' ' cat' .*; 'a' ' cat'", donor="a cat")
    refuse("--answers are two words, not 1", answers=[" her"])
    refuse("' her home' is not one token", answers=[" her home", " cat"])
    refuse("must have the token ' a' twice, and has it not at all", "4", answers=[" a", " cat"])
    refuse("the answers ' her' and ' her' are the same token; they must be two", answers=[" her", " her"])
    (tmp_path / "pairs.tsv").write_text("a cat\ta her\t her\n")
    refuse("line 1 has 3 columns", pairs=tmp_path / "pairs.tsv", clean=None, donor=None, answers=None)
    refuse("--pairs excludes", pairs=tmp_path / "pairs.tsv")
    for name in ("clean", "donor"):
        with pytest.raises(JaxqkvError, match=f"--{name} is empty; give a text, or leave it out for the study's own"):
            head_patching.figure("5", model=folder, **{name: ""}, answers=PAIRS[0][2:])
        with pytest.raises(JaxqkvError, match="--pairs excludes"):
            head_patching.figure("5", model=folder, **{name: ""}, pairs=tmp_path / "pairs.tsv")
    bert = write_word_tokenizer(write_folder(tmp_path / "bert", changed(BERT, n_layer=1)), WORDS)
    line = ["figures", "head-patching", "--model", str(bert), "--clean", PAIRS[0][0], "--donor", PAIRS[0][1]]
    main([*line, "--answers", *PAIRS[0][2:], "--arrays-only", "--out", str(tmp_path)])
    assert {path.stem for path in (tmp_path / "head-patching").glob("*.npz")} == {"3a", "3b", "4"}
    assert "bert has no next-token logits" in capsys.readouterr().err
    assert len(study("head-patching").figures) == 7
