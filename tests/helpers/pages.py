"""What tests of the two pages share: tabs that must not complain, and what an attention page shows."""

import base64
import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

import jaxqkv
from helpers.browser import Browser
from helpers.checkpoints import MANY_TEXT, write_checkpoint_of_words
from jaxqkv.pages import view

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Tests of pages share a browser, a page and compiled programs: they are in one worker.
TOGETHER = pytest.mark.xdist_group("pages")
# Of a module that opens a browser.
MARKS = [
    TOGETHER,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; apt-get install chromium"),
]

DRAWN = "document.documentElement.dataset.drawn !== undefined"
# Colours of the lowest, middle and highest value, as the page's style has them.
LIGHT = np.array([[0xFF, 0xFF, 0xFF], [0x5B, 0x93, 0xDD], [0x0A, 0x1D, 0x4A]])
DARK = np.array([[0x1A, 0x1B, 0x1E], [0x3D, 0x6F, 0xC0], [0xF2, 0xF6, 0xFF]])


# What the first test that needs it makes for all.
_made = {}


def one_browser(request, tmp_path_factory):
    """A fixture: one process for all tests of a worker."""
    if "browser" not in _made:
        _made["browser"] = Browser(CHROMIUM, tmp_path_factory.mktemp("chromium") / "profile")
        request.config.add_cleanup(_made["browser"].close)
    return _made["browser"]


def quiet_tabs(browser):
    """A fixture: opens pages; each is closed, and none may have complained or asked for more than files."""
    pages = []

    def open(path, **options):
        pages.append(browser.open(path, **options))
        return pages[-1]

    yield open
    for page in pages:
        complaints, requests = page.complaints(), page.requests()
        page.close()
        assert complaints == [], complaints
        assert [address for address in requests if not address.startswith("file:")] == []


def tiny_page(tmp_path_factory):
    """A fixture: a page of 3 layers, 5 heads and 11 tokens, and its model; one for all tests of a worker."""
    if "tiny" not in _made:
        folder = tmp_path_factory.mktemp("view")
        model = jaxqkv.load(write_checkpoint_of_words(folder / "tiny"))
        view.write_view(folder / "attention.html", model, MANY_TEXT, command="jaxqkv view <tiny>")
        _made["tiny"] = folder / "attention.html", model
    return _made["tiny"]


def shades(fraction, colours):
    """Where on the way through three colours: [..., 3]."""
    place = 2 * np.asarray(fraction)[..., None]
    low, middle, high = colours
    return np.where(place < 1, low + place * (middle - low), middle + (place - 1) * (high - middle))


def shades_of_scores(scores, seen, colours):
    low, high = scores[seen].min(), scores[seen].max()
    return shades(np.clip((scores - low) / (high - low), 0, 1), colours)


def shades_of_norms(norms, colours):
    return shades(np.sqrt(norms / norms.max()), colours)


def canvas(page, selector):
    """A canvas's pixels, [y, x, red green blue alpha]."""
    values = page.evaluate(
        f"(() => {{ const drawn = document.querySelector({json.dumps(selector)});"
        "const copy = new OffscreenCanvas(drawn.width, drawn.height).getContext('2d', {willReadFrequently: true});"
        "copy.drawImage(drawn, 0, 0);"
        "return [drawn.width, ...copy.getImageData(0, 0, drawn.width, drawn.height).data]; })()"
    )
    return np.array(values[1:]).reshape(values[0], values[0], 4)


def head(layer, number):
    return f'[aria-label="Layer {layer}, head {number}: enlarge"]'


def assert_drawn(pixels, expected, seen):
    """Every visible pair in its colour, to the two steps of 255 between 256 shades; the others transparent."""
    assert (pixels[~seen][:, 3] == 0).all()
    assert (pixels[seen][:, 3] == 255).all()
    np.testing.assert_allclose(pixels[seen][:, :3], expected[seen], rtol=0, atol=2)


def tokens(page):
    """Each token's number, its class, its background, and whether it is the one whose attention is shown."""
    return page.evaluate(
        "[...document.querySelectorAll('#tokens li')].map((item) => ({number: item.querySelector('small').textContent,"
        "hidden: item.classList.contains('unseen'), selected: item.getAttribute('aria-selected') === 'true',"
        "colour: getComputedStyle(item).backgroundColor.match(/\\d+/g).map(Number)}))"
    )


def assert_numbers(page, query, weights):
    """The tokens show `query`'s weights, in numbers and in shades."""
    for key, shown in enumerate(tokens(page)):
        assert shown["selected"] == (key == query)
        assert shown["hidden"] == (key > query)
        if key > query:
            assert shown["number"] == ""
        else:
            assert float(shown["number"]) == pytest.approx(weights[key], abs=0.00051)
            colour = shades(np.sqrt(weights[key]), LIGHT)
            np.testing.assert_allclose(shown["colour"][:3], colour, rtol=0, atol=2)


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


def number(text):
    """A number with the sign of the field."""
    return float(text.replace("−", "-"))


class Blocks(HTMLParser):
    """The page's JSON by id, and its other scripts."""

    def __init__(self, page):
        super().__init__()
        self.data, self.scripts, self.tags, self._id = {}, [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self._id = attributes.get("id", "script") if tag == "script" else None
        assert not any(name.startswith("on") for name in attributes)

    def handle_endtag(self, tag):
        self._id = None

    def handle_data(self, data):
        if self._id == "script":
            self.scripts.append(data)
        elif self._id:
            self.data[self._id] = json.loads(data)


def decoded(head):
    """Values of a head's visible pairs, as the page has them."""
    levels = np.frombuffer(base64.b64decode(head["values"]), "<u2")
    return head["low"] + levels / 65534 * (head["high"] - head["low"])


def vectors_levels(head):
    """The levels of a head's q or k, [pos, head_dim]."""
    width = len(base64.b64decode(head["low"])) // 4
    return np.frombuffer(base64.b64decode(head["values"]), "<u2").reshape(-1, width)


def vectors_in(head):
    """A head's q or k, [pos, head_dim], as the page has it."""
    low, high = (np.frombuffer(base64.b64decode(head[end]), "<f4").astype(float) for end in ("low", "high"))
    return low + vectors_levels(head) / 65534 * (high - low)
