"""The gallery and the attention page in a browser: what is drawn, mouse and keyboard, narrow windows, no network."""

import json
import re

import numpy as np
import pytest
from conftest import BERT, GPT2, changed, random_tensors, write_folder
from helpers.checkpoints import HOSTILE, write_checkpoint_of_words
from helpers.checkpoints import MANY_TEXT as TEXT
from helpers.oracles import attention_of, weighted_of
from helpers.pages import (
    DARK,
    DRAWN,
    LIGHT,
    MARKS,
    assert_drawn,
    assert_numbers,
    canvas,
    head,
    one_browser,
    overflow,
    quiet_tabs,
    shades,
    shades_of_norms,
    shades_of_scores,
    tiny_page,
    tokens,
)

import jaxqkv
from jaxqkv.cli.main import main
from jaxqkv.pages import view

pytestmark = MARKS
browser = pytest.fixture(one_browser)
tab = pytest.fixture(quiet_tabs)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A page of 3 layers, 5 heads and 11 tokens; its path, and scores, pattern, seen pairs and norms to find in it."""
    path, model = tiny_page(tmp_path_factory)
    return path, *attention_of(model, TEXT), weighted_of(model, TEXT)


@pytest.fixture(scope="session")
def gallery(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    model = str(write_folder(folder / "<script>hacked=1<", GPT2))
    for study, *ids in (("qkv-weights", "1", "2d"), ("weight-tour", "architecture", "--compare", model)):
        assert main(["figures", study, *ids, "--out", str(folder / "figures"), "--dpi", "90", "--model", model]) == 0
    return folder / "figures" / "index.html"


@pytest.mark.parametrize(("dark", "colours"), [(False, LIGHT), (True, DARK)])
def test_the_grid_has_the_values_of_every_head(tab, tiny, dark, colours):
    path, scores, pattern, seen, norms = tiny
    page = tab(path, height=1600, dark=dark, ready=DRAWN)
    for layer, number in np.ndindex(3, 5):
        pixels = canvas(page, f"{head(layer, number)} canvas")
        assert_drawn(pixels, shades(np.sqrt(pattern[layer, number]), colours), seen)
    page.click(".kinds [value=scores]")
    page.wait("document.documentElement.dataset.drawn === 'scores'")
    for layer, number in np.ndindex(3, 5):
        pixels = canvas(page, f"{head(layer, number)} canvas")
        assert_drawn(pixels, shades_of_scores(scores[layer, number], seen, colours), seen)
    page.click(".kinds [value=weighted]")
    page.wait("document.documentElement.dataset.drawn === 'weighted'")
    for layer, number in np.ndindex(3, 5):
        pixels = canvas(page, f"{head(layer, number)} canvas")
        assert_drawn(pixels, shades_of_norms(norms[layer, number], colours), seen)
    assert page.requests() == [path.as_uri()]


def test_the_enlarged_head_is_on_the_screen(tab, tiny):
    path, scores, pattern, seen, norms = tiny
    page = tab(path, ready=DRAWN)
    page.click(head(1, 3))
    assert page.evaluate("document.getElementById('large').open")
    assert page.evaluate("document.getElementById('large-title').textContent") == "Layer 1, head 3"
    page.hover("#close")

    def centres():
        x, y, width, height = page.box("#matrix")
        assert width == height > 300
        middle = (np.arange(11) + 0.5) / 11
        return page.screenshot()[np.ix_((y + middle * height).astype(int), (x + middle * width).astype(int))]

    on_screen = centres()
    np.testing.assert_allclose(on_screen[seen], shades(np.sqrt(pattern[1, 3]), LIGHT)[seen], rtol=0, atol=3)
    assert len(np.unique(on_screen[seen], axis=0)) > 20
    page.click("#large [value=scores]")
    np.testing.assert_allclose(centres()[seen], shades_of_scores(scores[1, 3], seen, LIGHT)[seen], rtol=0, atol=3)
    label = "document.getElementById('matrix').getAttribute('aria-label')"
    assert page.evaluate(label) == "Scores of Layer 1, head 3, 11 by 11 tokens"
    page.click("#large [value=weighted]")
    np.testing.assert_allclose(centres()[seen], shades_of_norms(norms[1, 3], LIGHT)[seen], rtol=0, atol=3)
    assert page.evaluate(label) == "Weighted of Layer 1, head 3, 11 by 11 tokens"
    ticks = page.evaluate("[...document.querySelectorAll('#large-legend .ticks span')].map((tick) => tick.textContent)")
    largest = norms[1, 3].max()
    np.testing.assert_allclose([float(tick) for tick in ticks], [0, largest / 4, largest], rtol=0, atol=0.0006)
    page.click("#large [value=scores]")
    page.theme(dark=True)
    page.wait("getComputedStyle(document.body).backgroundColor === 'rgb(26, 27, 30)'")
    np.testing.assert_allclose(centres()[seen], shades_of_scores(scores[1, 3], seen, DARK)[seen], rtol=0, atol=3)


def test_what_is_no_number_is_marked_and_said(tab, tmp_path):
    tensors = random_tensors(GPT2)
    tensors["h.1.attn.c_attn.weight"][3, 5] = np.nan
    model = jaxqkv.load(write_checkpoint_of_words(tmp_path / "tiny", tensors=tensors))
    with pytest.warns(jaxqkv.JaxqkvWarning, match=r"h\.1\.attn\.c_attn\.weight"):
        view.write_view(tmp_path / "attention.html", model, TEXT)
    page = tab(tmp_path / "attention.html", ready=DRAWN)
    seen = np.tril(np.ones((11, 11), bool))
    assert_drawn(canvas(page, f"{head(1, 0)} canvas"), np.broadcast_to([0xC2, 0x18, 0x5B], (11, 11, 3)), seen)
    assert len(np.unique(canvas(page, f"{head(1, 1)} canvas")[seen], axis=0)) > 20
    page.click(head(2, 4))
    assert page.evaluate("document.getElementById('said').textContent").endswith("has no weight that is a number.")
    assert {token["number"] for token in tokens(page)} == {"NaN"}


@pytest.mark.parametrize(("config", "hidden"), [(GPT2, False), (BERT, True)], ids=["causal", "both ways"])
def test_that_there_are_no_numbers_is_said_whatever_a_mask_hides(tab, tmp_path, config, hidden):
    tensors = random_tensors(config)
    name = "h.2.attn.c_attn.bias" if config is GPT2 else "encoder.layer.2.attention.self.query.bias"
    tensors[name][3] = np.nan
    model = jaxqkv.load(write_checkpoint_of_words(tmp_path / "tiny", config, tensors))
    with pytest.warns(jaxqkv.JaxqkvWarning, match=re.escape(name)):
        view.write_view(tmp_path / "page.html", model, TEXT)
    page = tab(tmp_path / "page.html", ready=DRAWN)
    notes = "[...document.querySelectorAll('{}')].map((note) => note.checkVisibility())"
    assert page.evaluate(notes.format("p.note")) == [True]
    assert page.evaluate("document.querySelector('p.note').innerText").startswith(
        f"{169 if hidden else 66} scores are NaN or infinite: "
    )
    page.click(head(2, 0))
    assert page.evaluate(notes.format(".hatched")) == [not hidden] * 2
    assert page.evaluate("document.getElementById('sum').textContent").endswith(
        "sum to the score, NaN; the positive ones to NaN, the negative ones to NaN."
    )


def test_a_token_under_the_mouse_shows_what_it_attends_to(tab, tiny):
    path, scores, pattern, _, norms = tiny
    page = tab(path, ready=DRAWN)
    page.click(head(2, 4))
    page.hover("#close")
    assert_numbers(page, 10, pattern[2, 4, 10])  # the last token, until another is chosen
    others = "; the weights of 1 other token sum to "
    most, _, rest = page.evaluate("document.getElementById('most').textContent").partition(others)
    assert most == "Largest weights of “·w37”"
    assert float(rest) == pytest.approx(pattern[2, 4, 10].min(), abs=2e-4)  # 1 less ten weights
    page.hover("#token-7")
    weights = pattern[2, 4, 7]
    assert_numbers(page, 7, weights)
    cells = "[...row.children].map((cell) => cell.textContent)"
    table = f"[...document.querySelectorAll('#keys tr')].map((row) => {cells})"
    rows = page.evaluate(table)
    order = np.argsort(-weights[:8], kind="stable")
    assert [row[0] for row in rows] == [f"·{TEXT.split()[key]}" for key in order]
    assert [int(row[1]) for row in rows] == order.tolist()
    np.testing.assert_allclose([float(row[2]) for row in rows], weights[order], rtol=0, atol=0.00006)
    written = [float(row[3].replace("−", "-")) for row in rows]
    np.testing.assert_allclose(written, scores[2, 4, 7, order], rtol=0, atol=0.0006)  # three digits
    np.testing.assert_allclose([float(row[4]) for row in rows], norms[2, 4, 7, order], rtol=0, atol=0.0006)
    page.click("#large [value=weighted]")
    page.hover("#token-7")
    order = np.argsort(-norms[2, 4, 7, :8], kind="stable")
    assert [int(row[1]) for row in page.evaluate(table)] == order.tolist()
    numbers = [float(token["number"]) for token in tokens(page)[:8]]
    np.testing.assert_allclose(numbers, norms[2, 4, 7, :8], rtol=0, atol=0.0051)
    said = page.evaluate("document.getElementById('said').textContent")
    assert said.startswith(f"“·w23”, position 7, takes most from “·{TEXT.split()[order[0]]}”, norm ")
    assert float(said.split()[-1][:-1]) == pytest.approx(norms[2, 4, 7].max(), abs=0.0006)
    page.click("#large [value=pattern]")
    page.hover("#token-7")
    top = "document.querySelector('{}').getBoundingClientRect().top"
    below = page.evaluate(f"{top.format('.mark')} - {top.format('#matrix')}")
    np.testing.assert_allclose(below / page.box("#matrix")[3], 7 / 11, atol=1e-3)
    page.hover("#close")
    assert_numbers(page, 10, pattern[2, 4, 10])
    page.click("#token-4")
    page.hover("#close")
    assert_numbers(page, 4, pattern[2, 4, 4])


def test_a_pair_under_the_mouse_shows_its_numbers(tab, tiny):
    path, scores, pattern, _, norms = tiny
    page = tab(path, ready=DRAWN)
    page.click(head(0, 2))
    page.hover("#matrix", across=(3 + 0.5) / 11, down=(8 + 0.5) / 11)
    said = page.evaluate("document.getElementById('said').textContent")
    assert said.startswith("“·w29”, position 8, to “·w11”, position 3: weight ")
    numbers = re.fullmatch(r".*: weight (.*), score (.*), norm (.*)\.", said).groups()
    weight, score, norm = (float(number.replace("−", "-")) for number in numbers)
    assert weight == pytest.approx(pattern[0, 2, 8, 3], abs=0.00006)
    assert score == pytest.approx(scores[0, 2, 8, 3], abs=0.0006)
    assert norm == pytest.approx(norms[0, 2, 8, 3], abs=0.0006)
    page.hover("#matrix", across=(9 + 0.5) / 11, down=(2 + 0.5) / 11)
    assert page.evaluate("document.getElementById('said').textContent") == (
        "“·w7”, position 2, does not see “·w31”, position 9: it comes later."
    )


def test_the_attention_page_by_keyboard(tab, tiny):
    path, _, pattern, *_ = tiny
    page = tab(path, ready=DRAWN)
    page.press("Tab", "Tab", "Tab")  # the text, which kind, the grid
    focused = "document.activeElement.getAttribute('aria-label')"
    assert page.evaluate(focused) == "Layer 0, head 0: enlarge"
    page.press("ArrowRight", "ArrowDown", "ArrowRight", "ArrowUp", "ArrowLeft", "ArrowDown", "ArrowDown", "ArrowDown")
    assert page.evaluate(focused) == "Layer 2, head 1: enlarge"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("Enter")
    assert page.evaluate("document.getElementById('large').open")
    page.press("ArrowUp", "End")
    assert page.evaluate("document.getElementById('large-title').textContent") == "Layer 1, head 4"
    page.evaluate("document.getElementById('tokens').focus()")
    page.press("Home", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft")
    assert_numbers(page, 2, pattern[1, 4, 2])
    assert page.evaluate("document.getElementById('tokens').getAttribute('aria-activedescendant')") == "token-2"
    page.press("Escape")
    assert not page.evaluate("document.getElementById('large').open")
    page.wait(f"{focused} === 'Layer 1, head 4: enlarge'")


def test_buttons_of_the_enlarged_head(tab, tiny):
    page = tab(tiny[0], ready=DRAWN)
    page.click(head(0, 4))
    page.click("#next")
    assert page.evaluate("document.getElementById('large-title').textContent") == "Layer 1, head 0"
    for _ in range(7):
        page.click("#previous")
    assert page.evaluate("document.getElementById('large-title').textContent") == "Layer 0, head 0"
    page.click("#close")
    assert not page.evaluate("document.getElementById('large').open")
    page.click(head(0, 4))
    page.call("Input.dispatchMouseEvent", type="mousePressed", x=3, y=450, button="left", clickCount=1)
    page.call("Input.dispatchMouseEvent", type="mouseReleased", x=3, y=450, button="left", clickCount=1)
    assert not page.evaluate("document.getElementById('large').open")


def test_a_text_cannot_break_out_of_the_page(tab, tmp_path):
    model = jaxqkv.load(write_checkpoint_of_words(tmp_path / "<script>hacked=1<"))
    text = f" w3{HOSTILE} w5 w7 w11 w13 w17"  # of eleven tokens, as other texts
    view.write_view(tmp_path / "page.html", model, text, command=HOSTILE)
    page = tab(tmp_path / "page.html", ready=DRAWN)
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.evaluate("document.querySelector('h1').textContent") == "Attention of <script>hacked=1<"
    assert page.evaluate("document.querySelector('blockquote').textContent") == text
    # Should something slip through after all, the page's policy stops it.
    page.evaluate(
        "(() => { const script = document.createElement('script'); script.textContent = 'hacked = 1';"
        "document.body.append(script); })()"
    )
    assert page.evaluate("typeof hacked") == "undefined"
    assert len(page.complaints()) == 1
    assert "Content Security Policy" in page.complaints()[0]
    page.browser.events.clear()  # it was meant to complain


def test_rows_of_heads_are_drawn_when_they_come_into_sight(tab, tmp_path):
    """Of twelve layers and twelve heads; long texts are in test_large_head.py."""
    config = changed(GPT2, n_layer=12, n_head=12, n_embd=36, n_positions=31)
    model = jaxqkv.load(write_checkpoint_of_words(tmp_path / "wide", config))
    text = "".join(f" w{number}" for number in np.random.default_rng(0).integers(0, 43, 31))
    view.write_view(tmp_path / "page.html", model, text, layers=None)
    page = tab(tmp_path / "page.html", height=400, ready=DRAWN)
    sizes = "[...document.querySelectorAll('#grid canvas')].map((canvas) => canvas.width)"
    first = page.evaluate(sizes)
    assert len(first) == 144
    assert first[:12] == [31] * 12
    assert first[-12:] == [300] * 12  # out of sight: not decoded, not drawn
    for layer in range(12):
        page.box(head(layer, 0))
        page.wait(f"document.querySelector({json.dumps(head(layer, 11))}).firstChild.width === 31")
    assert page.evaluate(sizes) == [31] * 144
    _, pattern, seen = attention_of(model, text)
    assert_drawn(canvas(page, f"{head(11, 7)} canvas"), shades(np.sqrt(pattern[11, 7]), LIGHT), seen)


def test_bert_sees_both_ways(tab, tmp_path):
    model = jaxqkv.load(write_checkpoint_of_words(tmp_path / "bert", BERT))
    view.write_view(tmp_path / "page.html", model, TEXT)
    page = tab(tmp_path / "page.html", ready=DRAWN)
    _, pattern, seen = attention_of(model, TEXT)
    assert seen.all()
    assert_drawn(canvas(page, f"{head(1, 2)} canvas"), shades(np.sqrt(pattern[1, 2]), LIGHT), seen)
    page.click(head(1, 2))
    page.hover("#token-0")
    assert page.evaluate("document.querySelector('#token-0 bdi').textContent") == "[CLS]"
    numbers = [float(each["number"]) for each in tokens(page)]
    np.testing.assert_allclose(numbers, pattern[1, 2, 0], rtol=0, atol=0.00051)
    assert page.evaluate("[...document.querySelectorAll('.hatched')].every((note) => note.hidden)")


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_shows_the_page_without_scrolling_sideways(tab, tiny, width):
    page = tab(tiny[0], width=width, height=844, ready=DRAWN)
    assert overflow(page) == 0
    page.click(head(1, 1))
    dialog = "document.getElementById('large')"
    assert page.evaluate(f"{dialog}.open")
    assert page.evaluate(f"{dialog}.scrollWidth - {dialog}.clientWidth") == 0
    assert overflow(page) == 0


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_shows_the_gallery_without_scrolling_sideways(tab, gallery, width):
    page = tab(gallery, width=width, height=844)
    assert overflow(page) == 0
    assert page.evaluate("document.querySelector('figure img').clientWidth") <= width


def test_the_gallery_opens_pictures_in_full(tab, gallery):
    page = tab(gallery)
    assert page.evaluate("typeof hacked") == "undefined"
    page.box("#qkv-weights-2d img")
    page.wait("document.querySelector('#qkv-weights-2d img').naturalWidth > 0")
    page.click("#qkv-weights-2d img")
    assert page.evaluate("document.getElementById('large').open")
    page.wait("document.querySelector('#large img').naturalWidth > 0")
    x, y, width, height = (int(value) for value in page.box("#large img"))
    picture = page.screenshot()[y : y + height, x : x + width]
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
    for colour in ([0xD1, 0x49, 0x5B], [0x3A, 0x9D, 0x5D], [0x4A, 0x78, 0xC9]):  # Q, K and V are there
        assert (np.abs(picture - colour).max(axis=-1) < 12).sum() > 100
    assert page.evaluate("document.querySelector('#large a').getAttribute('href')").endswith("qkv-weights/2d.png")
    assert page.evaluate("document.querySelector('#large img').alt") == (
        "Figure 2d of qkv-weights: mean and standard deviation of W_Q, W_K and W_V by layer"
    )
    page.click("#large .close")
    assert not page.evaluate("document.getElementById('large').open")


def assert_undistorted(page, natural):
    """The large picture has the shape of the file; how many of its own pixels a pixel of it is across."""
    _, _, width, height = page.box("#large img")
    assert abs(width / height / (natural[0] / natural[1]) - 1) < 0.01
    return width / natural[0]


@pytest.mark.parametrize("window", [(1280, 900), (1000, 500), (400, 800)])
def test_the_gallery_s_large_pictures_keep_their_shape(tab, gallery, window):
    """Whole in a wide window, and in full after one more click, which keeps in sight what was clicked."""
    page = tab(gallery, width=window[0], height=window[1])
    for figure in ("qkv-weights-2d", "weight-tour-architecture"):  # a wide one, and after it a tall one
        page.box(f"#{figure} img")
        page.wait(f"document.querySelector('#{figure} img').naturalWidth > 0")
        size = "['naturalWidth', 'naturalHeight'].map((side) => document.querySelector('#{} img')[side])"
        natural = page.evaluate(size.format(figure))
        page.click(f"#{figure} img")
        page.wait(f"{size.format('large')}.join() === '{natural[0]},{natural[1]}'")
        scale = assert_undistorted(page, natural)
        assert scale <= 1 or window[0] == 400  # on a phone it is larger than the screen, and moves
        page.click("#large img", across=0.7, down=0.6)
        box = page.evaluate(
            "(() => { const b = document.querySelector('#large img').getBoundingClientRect();"
            "return [b.x + 0.7 * b.width, b.y + 0.6 * b.height]; })()"
        )
        assert 0 <= box[0] <= window[0]
        assert 0 <= box[1] <= window[1]
        assert assert_undistorted(page, natural) == pytest.approx(1, abs=0.01)
        page.click("#large .size")
        assert assert_undistorted(page, natural) == pytest.approx(scale)
        page.press("Escape")
        assert not page.evaluate("document.getElementById('large').open")


def test_the_gallery_by_keyboard(tab, gallery):
    page = tab(gallery)
    link = "document.activeElement.getAttribute('href')"
    page.press("Tab", "Tab", "Tab")
    assert page.evaluate(link) == "#qkv-weights-2d"
    page.press("Enter")
    page.wait("location.hash === '#qkv-weights-2d'")
    page.press("Tab")
    assert page.evaluate(link) == "qkv-weights/2d.png"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("Enter")
    assert page.evaluate("document.getElementById('large').open")
    page.press("Escape")
    assert not page.evaluate("document.getElementById('large').open")
    assert page.evaluate(link) == "qkv-weights/2d.png"


def test_the_gallery_copies_the_command_of_a_figure(tab, gallery):
    page = tab(gallery)
    page.browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite"])
    page.click("#qkv-weights-2d .copy")
    page.wait("document.querySelector('#qkv-weights-2d .copy').textContent === 'Copied'")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == page.evaluate("document.querySelector('#qkv-weights-2d code').textContent")
    assert copied.startswith("jaxqkv figures qkv-weights 2d --out ")


@pytest.mark.parametrize(("dark", "colour"), [(False, [0xFF] * 3), (True, [0x1A, 0x1B, 0x1E])])
def test_the_gallery_is_dark_where_the_reader_s_system_is(tab, gallery, dark, colour):
    assert tab(gallery, dark=dark).screenshot()[2, 2].tolist() == colour
