"""Counts and batches against the loop over single tokens; what is kept, and when it is used."""

import numpy as np
import pytest
from conftest import write_word_tokenizer

import jaxqkv.text.corpora
from jaxqkv.architectures import REGISTRY
from jaxqkv.errors import CorpusError
from jaxqkv.text import counting
from jaxqkv.text.counting import TokenCounts, count_and_rows
from jaxqkv.text.tokenizers import Tokenizer

WORDS = ["?", *(f" w{n}" for n in range(12))]
VOCAB = 17  # the model may have more tokens than its tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    return Tokenizer.from_folder(write_word_tokenizer(tmp_path / "tokenizer", WORDS), REGISTRY.known["gpt2"])


def documents(count=23, seed=0):
    """Documents of 0 to 12 words; the frequent words are the first."""
    generator = np.random.default_rng(seed)
    return ["".join(WORDS[1:][int(12 * u**3)] for u in generator.random(generator.integers(13))) for _ in range(count)]


class Read(list):
    """Documents that count how often they are read."""

    def __init__(self, texts, fingerprint="one"):
        super().__init__(texts)
        self.taken = 0
        self.corpus = jaxqkv.text.corpora.Corpus("texts", {}, fingerprint, self.read)

    def read(self):
        for text in self:
            self.taken += 1
            yield text


def count_and_batch(*arguments, **options):
    """Counts, and all rows together."""
    counts, rows = count_and_rows(*arguments, **options)
    rows = list(rows)
    assert [row.number for row in rows] == list(range(len(rows)))
    return counts, np.stack([row.ids for row in rows]) if rows else None


def loop(texts, tokenizer, tokens):
    """As the seed counts: document by document, token by token."""
    counts, total, used = np.zeros(VOCAB, int), 0, 0
    for text in texts:
        (ids,) = tokenizer.encode([text], special_tokens=False)
        used += bool(ids)
        for i in ids:
            counts[i] += 1
        total += len(ids)
        if total >= tokens:
            break
    return counts, used


@pytest.mark.parametrize("tokens", [1, 7, 50, 10_000])
@pytest.mark.parametrize("characters", [1, 37, 1 << 20])
def test_whole_documents_are_counted_until_there_are_enough_tokens(tokenizer, monkeypatch, tokens, characters):
    monkeypatch.setattr(counting, "CHARACTERS", characters)
    texts = documents()
    counts, _ = count_and_batch(Read(texts).corpus, tokenizer, VOCAB, tokens=tokens, cache=False)
    expected, used = loop(texts, tokenizer, tokens)
    np.testing.assert_array_equal(counts.counts, expected)
    assert (counts.documents, counts.tokens) == (used, expected.sum())
    assert counts.whole == (tokens == 10_000)


def test_the_batch_is_of_the_first_documents_that_are_long_enough(tokenizer):
    texts = documents()
    _, ids = count_and_batch(Read(texts).corpus, tokenizer, VOCAB, batch=5, length=7, cache=False)
    rows = [row for row in tokenizer.encode(texts, special_tokens=False) if len(row) >= 7]
    np.testing.assert_array_equal(ids, [row[:7] for row in rows[:5]])


def test_one_pass_serves_both(tokenizer):
    read = Read(documents())
    counts, ids = count_and_batch(read.corpus, tokenizer, VOCAB, tokens=30, batch=5, length=7, cache=False)
    assert read.taken <= len(read)
    np.testing.assert_array_equal(counts.counts, loop(read, tokenizer, 30)[0])
    np.testing.assert_array_equal(ids, count_and_batch(read.corpus, tokenizer, VOCAB, batch=5, length=7)[1])


@pytest.mark.parametrize("characters", [1, 29, 1 << 20])
def test_reading_begins_again_at_any_row(tokenizer, monkeypatch, characters):
    """From its place the same rows come, with the same numbers; what was before the place is not tokenised."""
    monkeypatch.setattr(counting, "CHARACTERS", characters)
    read = Read(documents())
    options = {"batch": 9, "length": 5, "cache": False}
    _, rows = count_and_rows(read.corpus, tokenizer, VOCAB, tokens=30, **options)
    rows = list(rows)
    assert len(rows) == 9
    for row in rows:
        _, again = count_and_rows(read.corpus, tokenizer, VOCAB, start=row.place, **options)
        again = [each for each in again if each.number >= row.number]
        assert [each.number for each in again] == list(range(row.number, 9))
        np.testing.assert_array_equal([each.ids for each in again], [each.ids for each in rows[row.number :]])
    if characters == 1:  # a document at a time, with the empty ones before it: the place is the row's own
        long = [n for n, ids in enumerate(tokenizer.encode(read, special_tokens=False)) if len(ids) >= 5]
        for row, n in zip(rows, long, strict=False):
            assert row.place.rows == row.number
            assert not any(read[row.place.documents : n])


def test_rows_are_read_when_they_are_taken(tokenizer, monkeypatch):
    monkeypatch.setattr(counting, "CHARACTERS", 1)
    read = Read([" w1 w2 w3"] * 50)
    _, rows = count_and_rows(read.corpus, tokenizer, VOCAB, batch=40, length=2, cache=False)
    assert read.taken == 0
    for number in range(5):
        next(rows)
        assert read.taken == number + 1


def test_a_large_batch_is_not_kept(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXQKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(counting, "KEPT_ROWS", 4)
    read = Read(documents())
    for batch, kept in ((5, 0), (4, 1)):
        count_and_batch(read.corpus, tokenizer, VOCAB, batch=batch, length=5)
        assert len(list((tmp_path / "cache").rglob("batch-*.npz"))) == kept


def test_log_frequency():
    counts = TokenCounts(np.array([3, 0, 1]), documents=2, whole=True)
    np.testing.assert_allclose(counts.log_frequency, [np.log(0.75), np.nan, np.log(0.25)])
    assert np.exp(counts.log_frequency[[0, 2]]).sum() == pytest.approx(1)


class TestTooLittle:
    def test_no_token(self, tokenizer):
        with pytest.raises(CorpusError, match=r"^texts: has no token to count$"):
            count_and_batch(Read(["", "", ""]).corpus, tokenizer, VOCAB, tokens=5)

    @pytest.mark.parametrize(
        ("batch", "length", "ways"),
        [
            (3, 5, "2 of its 3 documents have 5 tokens or more, and 3 are needed; --batch 2 or --length 2 would work"),
            (4, 5, "2 of its 3 documents have 5 tokens or more, and 4 are needed; --batch 2 would work"),
            (2, 9, "0 of its 3 documents have 9 tokens or more, and 2 are needed; --length 5 would work"),
            (7, 9, "0 of its 3 documents have 9 tokens or more, and 7 are needed; --batch 3 --length 2 would work"),
        ],
    )
    def test_too_few_long_documents(self, tokenizer, batch, length, ways):
        lengths = (2, 0, 5, 6)
        corpus = Read([" w1" * n for n in lengths]).corpus
        with pytest.raises(CorpusError) as caught:
            count_and_batch(corpus, tokenizer, VOCAB, batch=batch, length=length)
        assert str(caught.value) == f"texts: {ways}"
        # What it says would work, works.
        words = ways.split("; ")[1].removesuffix(" would work").split(" or ")
        for way in words:
            options = dict(zip(*[iter(way.replace("--", "").split())] * 2, strict=True))
            sizes = {"batch": batch, "length": length} | {name: int(value) for name, value in options.items()}
            assert count_and_batch(corpus, tokenizer, VOCAB, **sizes)[1].shape == (sizes["batch"], sizes["length"])

    def test_no_way_out_is_named_that_is_none(self, tokenizer):
        with pytest.raises(CorpusError, match=r"0 of its 3 documents .* give a corpus with text in it"):
            count_and_batch(Read([" w1"] * 3).corpus, tokenizer, VOCAB, batch=1, length=3)

    def test_counts_are_kept_although_documents_are_too_few(self, tokenizer, capsys):
        read = Read(documents(), fingerprint="too few")
        with pytest.raises(CorpusError, match="are needed"):
            count_and_batch(read.corpus, tokenizer, VOCAB, tokens=10_000, batch=99, length=7)
        counts, _ = count_and_batch(read.corpus, tokenizer, VOCAB, tokens=10_000, batch=2, length=7)
        assert "were counted before" in capsys.readouterr().err
        np.testing.assert_array_equal(counts.counts, loop(read, tokenizer, 10_000)[0])

    def test_no_text_at_all(self, tokenizer):
        with pytest.raises(CorpusError, match=r"0 of its 0 documents .* give a corpus with text in it"):
            count_and_batch(Read([" "[:0]]).corpus, tokenizer, VOCAB, batch=1, length=2)


class TestKept:
    def test_a_second_run_reads_nothing_and_says_so(self, tokenizer, capsys):
        read = Read(documents(), fingerprint="second run")
        first = count_and_batch(read.corpus, tokenizer, VOCAB, tokens=30, batch=5, length=7)
        taken = read.taken
        assert "counted before" not in capsys.readouterr().err
        second = count_and_batch(read.corpus, tokenizer, VOCAB, tokens=30, batch=5, length=7)
        assert read.taken == taken
        said = capsys.readouterr().err
        assert f"{first[0].tokens} tokens of texts were counted before; --no-cache" in said
        assert "5 documents of texts were tokenised before; --no-cache" in said
        np.testing.assert_array_equal(second[0].counts, first[0].counts)
        assert (second[0].documents, second[0].whole) == (first[0].documents, first[0].whole)
        np.testing.assert_array_equal(second[1], first[1])

    def test_another_batch_does_not_count_again(self, tokenizer, monkeypatch):
        read = Read(documents(), fingerprint="another batch")
        count_and_batch(read.corpus, tokenizer, VOCAB, tokens=10_000, batch=5, length=7)
        monkeypatch.setattr(counting, "CHARACTERS", 1)
        read.taken = 0
        count_and_batch(read.corpus, tokenizer, VOCAB, tokens=10_000, batch=1, length=2)
        assert read.taken < len(read) / 2

    def test_what_it_depends_on(self, tokenizer, tmp_path):
        texts = documents()
        (tmp_path / "other").mkdir()
        other = Tokenizer.from_folder(write_word_tokenizer(tmp_path / "other", WORDS[:9]), REGISTRY.known["gpt2"])
        assert other.fingerprint != tokenizer.fingerprint
        for each, fingerprint, tokens in (
            (tokenizer, "depends", 30),
            (other, "depends", 30),
            (tokenizer, "changed", 30),
            (tokenizer, "depends", 60),
        ):
            read = Read(texts if fingerprint == "depends" else texts[::-1], fingerprint)
            counts, _ = count_and_batch(read.corpus, each, VOCAB, tokens=tokens)
            np.testing.assert_array_equal(counts.counts, loop(read, each, tokens)[0])

    def test_no_cache_neither_looks_nor_keeps(self, tokenizer, monkeypatch, tmp_path):
        monkeypatch.setenv("JAXQKV_CACHE", str(tmp_path / "cache"))
        read = Read(documents())
        for _ in range(2):
            read.taken = 0
            count_and_batch(read.corpus, tokenizer, VOCAB, tokens=10_000, cache=False)
            assert read.taken == len(read)
        assert not (tmp_path / "cache").exists()

    def test_a_broken_file_is_counted_anew(self, tokenizer, monkeypatch, tmp_path):
        monkeypatch.setenv("JAXQKV_CACHE", str(tmp_path / "cache"))
        read = Read(documents())
        first, _ = count_and_batch(read.corpus, tokenizer, VOCAB, tokens=30)
        (path,) = (tmp_path / "cache").rglob("*.npz")
        whole = path.read_bytes()
        flipped = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(0, len(whole), 3)]
        for broken in (b"", whole[:100], whole[:-20], b"PK\x03\x04" + bytes(200), *flipped):
            path.write_bytes(broken)
            again, _ = count_and_batch(read.corpus, tokenizer, VOCAB, tokens=30)
            np.testing.assert_array_equal(again.counts, first.counts)
            assert (again.documents, again.whole) == (first.documents, first.whole)

    def test_a_cache_folder_that_is_a_file_is_said(self, tokenizer, monkeypatch, tmp_path, capsys):
        (tmp_path / "cache").write_text("")
        monkeypatch.setenv("JAXQKV_CACHE", str(tmp_path / "cache"))
        texts = documents()
        counts, _ = count_and_batch(Read(texts).corpus, tokenizer, VOCAB, tokens=30)
        np.testing.assert_array_equal(counts.counts, loop(texts, tokenizer, 30)[0])
        assert "counts of tokens are not kept" in capsys.readouterr().err
