"""Products by dimension of an enlarged head, in a browser."""

import itertools
import re

import numpy as np
import pytest
from conftest import BERT, GPT2, changed
from helpers.checkpoints import MANY_TEXT as TEXT
from helpers.checkpoints import write_checkpoint_of_words
from helpers.oracles import attention_of, attention_to, vectors_of, weighted_of
from helpers.pages import DRAWN, MARKS, Blocks, head, number, one_browser, quiet_tabs, tiny_page, vectors_in

import jaxqkv
from jaxqkv.pages import embedding, view

pytestmark = MARKS
browser = pytest.fixture(one_browser)
tab = pytest.fixture(quiet_tabs)
tiny = pytest.fixture(tiny_page)

TITLE = "document.getElementById('large-title').textContent"
SUM = "document.getElementById('sum').textContent"
SUMS = (
    r"sum to the score, (?P<score>\S+), to within (?P<within>\S+); "
    r"the positive ones to (?P<positive>\S+), the negative ones to (?P<negative>\S+)\.$"
)


def bars(page):
    """Of every dimension the texts of q, k and product in its title; where its bar begins, and its height."""
    found = page.evaluate(
        "[...document.querySelectorAll('#chart rect')].map((bar) => [bar.firstChild.textContent,"
        "Number(bar.getAttribute('y')), Number(bar.getAttribute('height')), bar.getAttribute('class')])"
    )
    said = [re.fullmatch(r"dimension (\d+): q (\S+) · k ([^\s/]+)(.*) = (\S+)", title).groups() for title, *_ in found]
    assert [int(each[0]) for each in said] == list(range(len(found)))
    texts = [[each[place] for each in said] for place in (1, 2, 4)]
    return *texts, [each[1:] for each in found], {each[3] for each in said}


def assert_right(texts, truth):
    """Numbers have two to four digits behind the point, and are right to one in the last."""
    units = np.array([10.0 ** -len(text.partition(".")[2]) for text in texts])
    assert set(units) <= {1e-2, 1e-3, 1e-4}
    assert (np.abs([number(text) for text in texts] - np.asarray(truth)) <= units).all()


def assert_products(page, q, k, scale, score):
    """The page has the products of one query and one key, in words, bars and a table; their sum is the score."""
    expected = q * k * scale
    shown_q, shown_k, products, drawn, _ = bars(page)
    for texts, truth in ((shown_q, q), (shown_k, k), (products, expected)):
        assert_right(texts, truth)
    assert expected.sum() == pytest.approx(score, abs=1e-5 * np.abs(expected).sum())
    said = re.search(SUMS, page.evaluate(SUM))
    sums = [score, expected[expected > 0].sum(), expected[expected < 0].sum()]
    assert_right([said["score"], said["positive"], said["negative"]], sums)
    high, low = max(0, expected.max()), min(0, expected.min())
    for product, (y, height, kind) in zip(expected, drawn, strict=True):
        assert height == pytest.approx(100 * abs(product) / (high - low), abs=0.05)
        assert y == pytest.approx(100 * (high - max(0, product)) / (high - low), abs=0.05)
        assert kind == ("negative" if product < 0 else "positive")
    cells = page.evaluate("[...document.querySelectorAll('#dimensions td')].map((cell) => cell.textContent)")
    largest = np.argsort(-np.abs(expected))
    assert [int(cell) for cell in cells[::4]] == largest[:8].tolist()
    for column, values in enumerate((q, k, expected), start=1):
        assert_right(cells[column::4], values[largest[:8]])
    label = page.evaluate("document.getElementById('chart').getAttribute('aria-label')")
    assert label.endswith(f"the largest, {cells[3]}, is in dimension {largest[0]}")


def test_products_of_a_query_and_a_key_sum_to_the_score(tab, tiny):
    path, model = tiny
    q, k = vectors_of(model, TEXT)
    scores, pattern, _ = attention_of(model, TEXT)
    page = tab(path, ready=DRAWN)
    page.click(head(1, 3))
    page.hover("#close")

    def check(layer, number, query, key):
        of_head = [each[layer, number] for each in (q, k)]
        assert_products(page, of_head[0][query], of_head[1][key], 7**-0.5, scores[layer, number, query, key])
        assert bars(page)[-1] == {"/√7"}
        words = TEXT.split()
        pair = f"From “·{words[query]}” ({query}) to “·{words[key]}” ({key})"
        assert page.evaluate(SUM).startswith(f"{pair}: the 7 products q_i·k_i/√7 sum to ")

    check(1, 3, 10, pattern[1, 3, 10].argmax())  # the last token and what it attends to most
    page.hover("#matrix", across=(3 + 0.5) / 11, down=(8 + 0.5) / 11)
    check(1, 3, 8, 3)
    page.hover("#close")
    check(1, 3, 10, pattern[1, 3, 10].argmax())
    page.click("#matrix", across=(2 + 0.5) / 11, down=(6 + 0.5) / 11)
    page.hover("#close")
    check(1, 3, 6, 2)  # both are kept
    assert page.evaluate("document.getElementById('key').value") == "2"
    page.click("#next")
    check(1, 4, 6, 2)
    page.click("#token-1")
    page.hover("#close")
    check(1, 4, 1, pattern[1, 4, 1].argmax())  # which does not see the chosen key
    page.click("#token-5")
    page.hover("#close")
    check(1, 4, 5, 2)
    page.click("#large [value=weighted]")
    page.hover("#close")
    check(1, 4, 5, 2)
    # By keyboard: the arrow keys choose a key and leave the head as it is.
    page.evaluate("document.getElementById('key').focus()")
    page.press("ArrowDown")
    check(1, 4, 5, 3)
    page.press("ArrowUp", "ArrowUp", "ArrowUp", "ArrowUp")
    check(1, 4, 5, weighted_of(model, TEXT)[1, 4, 5].argmax())
    assert page.evaluate("document.activeElement.id") == "key"


# What the page says of every pair of a head: query, key, the sentence about the pair, and that about its products.
ALL_PAIRS = """(() => {
  const said = [];
  for (let query = 0; query < size; query++)
    for (let key = 0; key < keysOf(query); key++) {
      point(query, key);
      said.push([query, key, ...["said", "sum"].map((id) => byId(id).textContent)]);
    }
  return said;
})()"""


def assert_certain(text, truth, error):
    """A number is right to one in its last digit, and has as many digits, up to four, as that allows."""
    places = len(text.partition(".")[2])
    assert abs(number(text) - truth) <= 10.0**-places * (1 + 1e-6)
    assert places == np.clip(np.floor(-np.log10(2 * error)), 0, 4)


def test_of_every_pair_the_products_sum_to_the_score_as_the_page_says_it(tab, tmp_path):
    """In the same digits as elsewhere on the page; and by how much they may miss it is no less than they do.

    In the first and the last layer of a trained model, whose values are of different sizes.
    """
    model = jaxqkv.load("demo-gpt2")
    text, chosen = "I saw her at the market.", (0, 7)
    view.write_view(tmp_path / "page.html", model, text, chosen)
    blocks = Blocks((tmp_path / "page.html").read_text()).data
    seen = attention_to(model, text)
    scores, q, k = (np.asarray(values, np.float64)[:, 0] for values in (seen.scores, seen.q, seen.k))
    page = tab(tmp_path / "page.html", ready=DRAWN)
    _, heads, tokens, width = q.shape
    for (row, layer), of_head in itertools.product(enumerate(chosen), range(heads)):
        page.evaluate(f"open({row}, {of_head})")
        said = page.evaluate(ALL_PAIRS)
        limit = page.evaluate("byId('precision').textContent.match(/, to within (\\S+); norms/)[1]")
        page.evaluate("dialog.close()")
        assert len(said) == tokens * (tokens + 1) // 2
        embedded = [vectors_in(blocks[f"vectors-{layer}"][name][of_head]) for name in "qk"]
        ends = blocks[f"layer-{layer}"]["scores"][of_head]
        score_error = (ends["high"] - ends["low"]) / 131068
        assert score_error <= float(limit) <= 2 * score_error
        half_level = [np.ptp(each, axis=0) / 131068 for each in embedded]
        for query, key, pair, products in said:
            sums = re.search(SUMS, products)
            assert sums["score"] == re.search(r"score (\S+),", pair)[1]
            assert_certain(sums["score"], scores[layer, of_head, query, key], score_error)
            truth = q[layer, of_head, query] * k[layer, of_head, key] * width**-0.5
            (q_shown, q_error), (k_shown, k_error) = (
                (each[at], error) for each, at, error in zip(embedded, (query, key), half_level, strict=True)
            )
            shown = q_shown * k_shown * width**-0.5
            errors = (np.abs(q_shown) * k_error + np.abs(k_shown) * q_error + q_error * k_error) * width**-0.5
            within = float(sums["within"])
            assert abs(shown.sum() - scores[layer, of_head, query, key]) <= within < 0.001
            assert_certain(sums["positive"], truth[truth > 0].sum(), errors.sum())
            assert_certain(sums["negative"], truth[truth < 0].sum(), errors.sum())


@pytest.mark.parametrize(
    ("config", "factors"),
    [
        (changed(GPT2, scale_attn_weights=False), {0: ""}),
        (changed(GPT2, scale_attn_by_inverse_layer_idx=True), {0: "/√7", 2: " · 0.126"}),
        (BERT, {2: "/√7"}),
    ],
    ids=["unscaled", "by layer", "bert"],
)
def test_the_products_are_scaled_as_the_scores_are(tab, tmp_path, config, factors):
    model = jaxqkv.load(write_checkpoint_of_words(tmp_path / "tiny", config))
    view.write_view(tmp_path / "page.html", model, TEXT)
    q, k = vectors_of(model, TEXT)
    scores = np.asarray(attention_to(model, TEXT).scores, np.float64)[:, 0]
    page = tab(tmp_path / "page.html", ready=DRAWN)
    for layer, factor in factors.items():
        page.click(head(layer, 2))
        page.hover("#matrix", across=(1 + 0.5) / scores.shape[-1], down=(4 + 0.5) / scores.shape[-1])
        scale = {"": 1.0, "/√7": 7**-0.5, " · 0.126": 7**-0.5 / 3}[factor]
        assert_products(page, q[layer, 2, 4], k[layer, 2, 1], scale, scores[layer, 2, 4, 1])
        assert bars(page)[-1] == {factor}
        page.press("Escape")


def test_a_page_without_q_and_k_says_so(tab, tmp_path, monkeypatch):
    model = jaxqkv.load(write_checkpoint_of_words(tmp_path / "tiny"))
    monkeypatch.setattr(view, "LIMIT_BYTES", embedding.pairs_bytes(GPT2, 3, 11))
    with pytest.warns(jaxqkv.JaxqkvWarning, match="no products"):
        view.write_view(tmp_path / "page.html", model, TEXT)
    page = tab(tmp_path / "page.html", ready=DRAWN)
    page.click(head(2, 0))
    page.click("#matrix", across=0.1, down=0.9)
    assert page.evaluate("document.getElementById('products').textContent").startswith(
        "The page has no products q_i·k_i"
    )
    assert page.evaluate(TITLE) == "Layer 2, head 0"
    assert "norm" in page.evaluate("document.getElementById('said').textContent")
