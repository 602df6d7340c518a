"""An enlarged head in a browser: saved pictures; and heads by type."""

import json
import re
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest
from conftest import BERT, GPT2, changed
from helpers.checkpoints import HOSTILE, write_checkpoint_of_words
from helpers.checkpoints import MANY_TEXT as TEXT
from helpers.induction import FEW_TEXTS, INDUCTION, PREVIOUS, write_induction
from helpers.oracles import attention_of, weighted_of
from helpers.pages import (
    DRAWN,
    LIGHT,
    MARKS,
    assert_drawn,
    assert_numbers,
    canvas,
    head,
    number,
    one_browser,
    overflow,
    quiet_tabs,
    shades,
    shades_of_norms,
    shades_of_scores,
    tiny_page,
)

import jaxqkv
from jaxqkv.pages import view
from jaxqkv.studies.heads import summary
from jaxqkv.studies.heads import types as heads_types

pytestmark = MARKS
browser = pytest.fixture(one_browser)
tab = pytest.fixture(quiet_tabs)
tiny = pytest.fixture(tiny_page)

SVG = "{http://www.w3.org/2000/svg}"
TITLE = "document.getElementById('large-title').textContent"


@pytest.fixture(scope="session")
def typed(tmp_path_factory):
    """The page of a model with one previous-token head and one induction head, and the types that it has."""
    folder = tmp_path_factory.mktemp("typed")
    model = jaxqkv.load(write_induction(folder / "made"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(heads_types, "TEXTS", FEW_TEXTS)
        types = summary.typed_heads(model)
    view.write_view(folder / "page.html", model, " w3 w5 w7 w3 w5", types=lambda model: types)
    return folder / "page.html", types


# --- pictures ---


def assert_picture(root, expected, seen, words):
    """A saved SVG has a rectangle of the right colour for every visible pair, and the tokens along its axes."""
    cells = root.findall(f".//{SVG}g[@id='matrix-cells']/{SVG}rect")
    pairs = [cell for cell in cells if cell.get("fill", "").startswith("rgb")]
    side = float(cells[-1].get("width"))  # of the frame
    size = len(seen)
    assert len(pairs) == seen.sum()
    found = np.full((size, size, 3), -1)
    for cell in pairs:
        assert float(cell.get("width")) == float(cell.get("height")) == pytest.approx(side / size)
        x, y = (round(float(cell.get(name)) * size / side) for name in "xy")
        found[y, x] = [int(each) for each in re.findall(r"\d+", cell.get("fill"))]
    np.testing.assert_allclose(found[seen], expected[seen], rtol=0, atol=2)
    assert (found[~seen] == -1).all()
    for side in ("query", "key"):
        assert [text.text for text in root.findall(f".//{SVG}text[@class='{side}']")] == words
    axes = [text.text for text in root.findall(f".//{SVG}text")]
    assert {"Query", "Key"} <= set(axes)


def test_the_enlarged_head_is_saved_as_svg(tab, tiny, tmp_path):
    """In the colours of paper, whatever the screen's are."""
    path, model = tiny
    scores, pattern, seen = attention_of(model, TEXT)
    norms = weighted_of(model, TEXT)
    page = tab(path, dark=True, ready=DRAWN)
    page.click(head(2, 1))
    words = [f"·{word}" for word in TEXT.split()]
    expected = {
        "pattern": (shades(np.sqrt(pattern[2, 1]), LIGHT), "Pattern", "Weight α", [0, 0.01, 0.1, 0.25, 0.5, 1]),
        "scores": (shades_of_scores(scores[2, 1], seen, LIGHT), "Scores", "Score",
                   [scores[2, 1][seen].min(), scores[2, 1][seen].max()]),
        "weighted": (shades_of_norms(norms[2, 1], LIGHT), "Weighted", "‖α v W_O‖",
                     [0, norms[2, 1].max() / 4, norms[2, 1].max()]),
    }  # fmt: skip
    for kind, (colours, title, bar, ends) in expected.items():
        page.click(f"#large [value={kind}]")
        file = page.download("#save-svg", tmp_path)
        assert file.name == f"tiny-layer-2-head-1-{kind}.svg"
        root = ElementTree.parse(file).getroot()
        assert_picture(root, colours, seen, words)
        assert root.find(f"{SVG}title").text == f"tiny: layer 2, head 1. {title}"
        assert root.find(f"{SVG}desc").text == f"Made by jaxqkv {jaxqkv.__version__}: jaxqkv view <tiny>"
        assert bar in [text.text for text in root.findall(f".//{SVG}text")]
        ticks = [number(tick.text) for tick in root.findall(f".//{SVG}text[@class='tick']")]
        np.testing.assert_allclose(ticks, ends, rtol=0, atol=0.0006)
        stops = [stop.get("stop-color") for stop in root.findall(f".//{SVG}stop")]
        found = [[int(each) for each in re.findall(r"\d+", stop)] for stop in stops]
        np.testing.assert_allclose(found, LIGHT, rtol=0, atol=2)


def cells_of_png(image, root):
    """The colours in the middle of every cell of a saved PNG, whose places the same head's SVG says."""
    group = root.find(f".//{SVG}g[@id='matrix-cells']")
    left, top = (float(each) for each in re.findall(r"[\d.]+", group.get("transform")))
    side = float(group.findall(f"{SVG}rect")[-1].get("width"))
    scale = image.shape[1] / float(root.get("width"))
    assert image.shape[0] == pytest.approx(scale * float(root.get("height")), abs=1)

    def at(size):
        middle = (np.arange(size) + 0.5) / size * side
        rows, columns = ((scale * (start + middle)).astype(int) for start in (top, left))
        return np.rint(255 * image[np.ix_(rows, columns)]).astype(int)

    return at


def test_the_enlarged_head_is_saved_as_png(tab, tiny, tmp_path):
    path, model = tiny
    _, pattern, seen = attention_of(model, TEXT)
    page = tab(path, dark=True, ready=DRAWN)
    page.click(head(1, 0))
    root = ElementTree.parse(page.download("#save-svg", tmp_path)).getroot()
    file = page.download("#save-png", tmp_path)
    assert file.name == "tiny-layer-1-head-0-pattern.png"
    image = matplotlib.image.imread(file)
    assert image.shape[1] == pytest.approx(3 * float(root.get("width")), abs=1)
    assert (image[0, 0, :3] == 1).all()
    pixels = cells_of_png(image, root)(11)[..., :3]
    np.testing.assert_allclose(pixels[seen], shades(np.sqrt(pattern[1, 0]), LIGHT)[seen], rtol=0, atol=3)


def test_a_long_text_is_shown_and_is_saved_as_one_image_with_positions(tab, tmp_path):
    config = changed(GPT2, n_layer=1, n_head=2, n_embd=6, n_positions=149)
    model = jaxqkv.load(write_checkpoint_of_words(tmp_path / "long", config))
    text = "".join(f" w{word}" for word in np.random.default_rng(0).integers(0, 43, 139))
    view.write_view(tmp_path / "page.html", model, text)
    _, pattern, seen = attention_of(model, text)
    (tmp_path / "saved").mkdir()
    page = tab(tmp_path / "page.html", ready=DRAWN)
    assert_drawn(canvas(page, f"{head(0, 1)} canvas"), shades(np.sqrt(pattern[0, 1]), LIGHT), seen)
    page.click(head(0, 1))
    assert_drawn(canvas(page, "#matrix"), shades(np.sqrt(pattern[0, 1]), LIGHT), seen)
    page.hover("#token-97")
    assert_numbers(page, 97, pattern[0, 1, 97])
    root = ElementTree.parse(page.download("#save-svg", tmp_path / "saved")).getroot()
    (image,) = root.findall(f".//{SVG}image")
    assert image.get("href").startswith("data:image/png;base64,")
    assert [text.text for text in root.findall(f".//{SVG}text[@class='key']")] == ["0", "25", "50", "75", "100", "125"]
    assert "Key (position)" in [text.text for text in root.findall(f".//{SVG}text")]
    image = matplotlib.image.imread(page.download("#save-png", tmp_path / "saved"))
    pixels = cells_of_png(image, root)(139)[..., :3]
    np.testing.assert_allclose(pixels[seen], shades(np.sqrt(pattern[0, 1]), LIGHT)[seen], rtol=0, atol=3)


def test_a_hostile_text_is_words_in_the_picture(tab, tmp_path):
    model = jaxqkv.load(write_checkpoint_of_words(tmp_path / "<script>hacked=1<"))
    view.write_view(tmp_path / "page.html", model, f" w3{HOSTILE} w5 w7 w11 w13 w17", command=HOSTILE)
    (tmp_path / "saved").mkdir()
    page = tab(tmp_path / "page.html", ready=DRAWN)
    page.click(head(0, 0))
    file = page.download("#save-svg", tmp_path / "saved")
    assert file.name == "-script-hacked-1-layer-0-head-0-pattern.svg"
    root = ElementTree.parse(file).getroot()
    assert root.find(f"{SVG}title").text == "<script>hacked=1<: layer 0, head 0. Pattern"
    assert {element.tag.removeprefix(SVG) for element in root.iter()} == {
        "svg", "title", "desc", "defs", "pattern", "rect", "text", "g", "linearGradient", "stop", "line"
    }  # fmt: skip


@pytest.mark.parametrize("command", ["a\x01\u202eb", ""])
def test_what_xml_cannot_hold_is_named_in_the_picture(tab, tmp_path, command):
    """Control characters in text, name and command; whatever else comes into a picture; half a pair."""
    model = jaxqkv.load(write_checkpoint_of_words(tmp_path / "ti\x01ny"))
    view.write_view(tmp_path / "page.html", model, TEXT.replace(" w3", " w3\x02", 1), command=command)
    (tmp_path / "saved").mkdir()
    page = tab(tmp_path / "page.html", ready=DRAWN)
    page.evaluate(r"page.tokens[0] = 'a\u0000\ud800b\ufffe🙂'")
    page.click(head(1, 2))
    root = ElementTree.parse(page.download("#save-svg", tmp_path / "saved")).getroot()
    assert root.find(f"{SVG}title").text == "tiU+0001ny: layer 1, head 2. Pattern"
    made = f"Made by jaxqkv {jaxqkv.__version__}: {'aU+0001U+202Eb' if command else ''}".strip()
    assert root.find(f"{SVG}desc").text == made
    words = [text.text for text in root.findall(f".//{SVG}text[@class='key']")]
    assert words[0] == "aU+0000U+D800bU+FFFE🙂"
    image = matplotlib.image.imread(page.download("#save-png", tmp_path / "saved"))
    assert image.shape[1] == pytest.approx(3 * float(root.get("width")), abs=1)
    assert not page.evaluate("document.getElementById('unsaved').checkVisibility()")


# Labels, and how they are cut.
LABELS = {
    "a" * 18: "a" * 18,
    "a" * 19: "a" * 17 + "…",
    "a" * 16 + "🙂🙂b": "a" * 16 + "🙂…",
    "🙂" * 18: "🙂" * 18,
    "🙂" * 19: "🙂" * 17 + "…",
    "e\u0301" * 19: "e\u0301" * 17 + "…",
    "👩\u200d🚀" * 19: "👩\u200d🚀" * 17 + "…",
}


def test_labels_are_cut_between_characters(tab, tiny, tmp_path):
    page = tab(tiny[0], ready=DRAWN)
    page.evaluate(f"page.tokens.splice(2, {len(LABELS)}, ...{json.dumps([*LABELS])})")
    page.click(head(1, 0))
    root = ElementTree.parse(page.download("#save-svg", tmp_path)).getroot()
    words = [f"·{word}" for word in TEXT.split()]
    for side in ("query", "key"):
        found = [text.text for text in root.findall(f".//{SVG}text[@class='{side}']")]
        assert found == [*words[:2], *LABELS.values(), *words[9:]]
    assert page.download("#save-png", tmp_path).stat().st_size > 1000


@pytest.mark.parametrize(
    "breaking",
    [
        "XMLSerializer.prototype.serializeToString = () => '<svg'",
        "HTMLCanvasElement.prototype.toBlob = function (then) { then(null); }",
        "CanvasRenderingContext2D.prototype.drawImage = () => { throw new Error('no room'); }",
    ],
)
def test_a_png_that_cannot_be_made_is_said(tab, tiny, breaking):
    page = tab(tiny[0], ready=DRAWN)
    shown = "document.getElementById('unsaved').checkVisibility()"
    page.click(head(1, 0))
    assert not page.evaluate(shown)
    page.evaluate(f"{{ {breaking} }}")
    page.click("#save-png")
    page.wait(shown)
    said = page.evaluate("document.getElementById('unsaved').textContent")
    assert said == "This browser could not make the PNG; save the picture as SVG."


# --- types ---


def in_order(page):
    """Heads as the grid shows them, (layer, head), and what their labels say behind that."""
    names = "[...document.querySelectorAll('#grid .cell')].map((cell) => cell.getAttribute('aria-label'))"
    found = [re.fullmatch(r"Layer (\d+), head (\d+)(.*): enlarge", name).groups() for name in page.evaluate(names)]
    return [(int(layer), int(head)) for layer, head, _ in found], [rest for *_, rest in found]


def order(page, name):
    page.evaluate(
        f"(() => {{ const order = document.getElementById('order'); order.value = {json.dumps(name)};"
        "order.dispatchEvent(new Event('change')); })()"
    )
    page.wait(DRAWN)


def test_heads_are_ordered_by_every_kind(tab, typed):
    path, types = typed
    page = tab(path, height=1600, ready=DRAWN)
    assert not page.evaluate("document.getElementById('unnamed').checkVisibility()")
    heads, labels = in_order(page)
    layers, number_of_heads = np.shape(types.names)
    assert heads == list(np.ndindex(layers, number_of_heads))
    named = {pair: f", {types.names[pair[0]][pair[1]]}" for pair in (INDUCTION, PREVIOUS)}
    assert dict(zip(heads, labels, strict=True)) == {pair: named.get(pair, "") for pair in heads}

    def assert_named(heads):
        below = page.evaluate("[...document.querySelectorAll('.name.type')].map((name) => name.textContent.trim())")
        assert dict(zip(heads, below, strict=True)) == {pair: named.get(pair, "").removeprefix(", ") for pair in heads}

    assert_named(heads)
    shown = {pair: canvas(page, f"{head(*pair)} canvas" if pair not in named else
                          f'[aria-label="Layer {pair[0]}, head {pair[1]}{named[pair]}: enlarge"] canvas')
             for pair in heads}  # fmt: skip
    for kind in types.kinds:
        order(page, kind.name)
        by = kind.value if kind.control is None else kind.value - kind.control
        heads, labels = in_order(page)
        assert sorted(heads) == list(np.ndindex(by.shape))
        assert_named(heads)
        values = np.array([by[pair] for pair in heads])
        ranked = np.where(np.isnan(values), -np.inf, values)  # copying by a head of which nothing is written
        assert (ranked[1:] <= ranked[:-1] + 1e-6).all()
        written = [number(label.removesuffix(":").split(" ")[-1]) for label in labels]
        np.testing.assert_allclose(written, values, rtol=0, atol=0.00051)
        assert all(f", {kind.name} " in label for label in labels)
        for place, pair in enumerate(heads):
            line, column = divmod(place, by.shape[1])
            pixels = canvas(page, f"[data-line='{line}'] > :nth-child({2 + column}) canvas")
            np.testing.assert_array_equal(pixels, shown[pair])
    assert in_order(page)[0][0] == tuple(np.unravel_index(np.nanargmax(types.kinds[-1].value), by.shape))
    order(page, "")
    assert in_order(page)[0] == list(np.ndindex(layers, number_of_heads))


def test_an_order_is_the_keyboard_s_too(tab, typed):
    path, types = typed
    page = tab(path, ready=DRAWN)
    focused = "document.activeElement.getAttribute('aria-label')"
    page.press("Tab", "Tab", "Tab")  # the text, which kind, the order
    assert page.evaluate("document.activeElement.id") == "order"
    page.press("ArrowDown", "ArrowDown", "ArrowDown")
    assert page.evaluate("document.getElementById('order').value") == "induction"
    page.wait(DRAWN)
    heads, _ = in_order(page)
    assert heads[0] == INDUCTION
    page.press("Tab")
    assert page.evaluate(focused).startswith(f"Layer {INDUCTION[0]}, head {INDUCTION[1]}, induction, induction 0.9")
    page.press("ArrowRight", "ArrowDown")
    width = len(types.names[0])
    place = min(1 + width, len(heads) - 1)
    layer, number_of_head = heads[place]
    assert page.evaluate(focused).startswith(f"Layer {layer}, head {number_of_head},")
    page.press("Home", "ArrowUp", "Enter")
    assert page.evaluate(TITLE) == f"Layer {INDUCTION[0]}, head {INDUCTION[1]} (induction)"
    kinds = {kind.name: kind for kind in types.kinds}
    said = page.evaluate("document.getElementById('type').textContent")
    value, control = (number(each) for each in re.search(r"induction (\S+) \(control (\S+)\)", said).groups())
    assert value == pytest.approx(kinds["induction"].value[INDUCTION], abs=0.00051)
    assert control == pytest.approx(kinds["induction"].control[INDUCTION], abs=0.00051)
    page.click("#next")
    layer, number_of_head = heads[1]
    assert page.evaluate(TITLE).startswith(f"Layer {layer}, head {number_of_head}")


def test_without_types_there_is_no_order_to_choose(tab, tiny):
    page = tab(tiny[0], ready=DRAWN)
    hidden = "['ordering', 'types', 'unnamed', 'type'].map((id) => document.getElementById(id).checkVisibility())"
    assert page.evaluate(hidden) == [False] * 4
    assert page.evaluate("document.querySelectorAll('.name').length") == 0


@pytest.mark.parametrize("width", [390, 320])
def test_types_fit_a_phone(tab, typed, width):
    page = tab(typed[0], width=width, height=844, ready=DRAWN)
    order(page, "duplicate")
    assert overflow(page) == 0
    page.click("#grid .cell")
    dialog = "document.getElementById('large')"
    assert page.evaluate(f"{dialog}.scrollWidth - {dialog}.clientWidth") == 0


def test_bert_has_types_and_norms(tab, tmp_path):
    model = jaxqkv.load(write_checkpoint_of_words(tmp_path / "bert", BERT))
    first = view.HeadKind("first", "attends to the first position", np.random.default_rng(0).uniform(size=(3, 5)))
    types = view.TypedHeads("About.", [first], [[""] * 5] * 3)
    view.write_view(tmp_path / "page.html", model, TEXT, types=lambda model: types)
    page = tab(tmp_path / "page.html", height=1600, ready=DRAWN)
    assert not any(map(any, types.names))
    assert page.evaluate("document.getElementById('unnamed').checkVisibility()")
    assert page.evaluate("document.getElementById('unnamed').textContent").startswith("No head of this model attends ")
    order(page, "first")
    values = [first.value[pair] for pair in in_order(page)[0]]
    assert (np.diff(values) <= 1e-6).all()
    order(page, "")
    page.click(".kinds [value=weighted]")
    page.wait("document.documentElement.dataset.drawn === 'weighted'")
    norms = weighted_of(model, TEXT)[2, 4]
    selector = '[aria-label^="Layer 2, head 4"] canvas'
    assert_drawn(canvas(page, selector), shades_of_norms(norms, LIGHT), np.ones(norms.shape, bool))
