"""The scaling figure: its arithmetic by hand, its pieces from a real run, and the README that has them."""

import json
import sys

import pytest
import scaling
from benchmarks import report
from conftest import BERT
from helpers.checkpoints import write_checkpoint_of_words

PIECES = {
    "seconds a sequence": 0.5,
    "seconds until the first": 7.0,
    "seconds a byte of text": 2e-9,
    "seconds of bins a sequence": 0.01,
}


def test_pieces_run_beside_each_other():
    one, eight, many = (scaling.predict(PIECES, devices) for devices in (1, 8, 64))
    sequences = 0.35 * 6_407_814
    assert one["model"] == pytest.approx(sequences * 0.5)
    assert one["tokenizer and bins"] == pytest.approx(20.2 * 2 + sequences * 0.01)
    assert one["download"] == pytest.approx(117)
    assert one["whole"] == pytest.approx(one["model"] + 7)
    # Eight devices are one machine, 64 are eight.
    assert eight["model"] == pytest.approx(one["model"] / 8)
    assert eight["tokenizer and bins"] == one["tokenizer and bins"]
    assert many["download"] == pytest.approx(117 / 8)
    slow = scaling.predict(PIECES | {"seconds of bins a sequence": 0.4}, 64)
    assert slow["whole"] == pytest.approx(slow["tokenizer and bins"] + 7)


def test_the_pieces_of_a_run(tmp_path, monkeypatch, capsys):
    model, corpus, out = write_checkpoint_of_words(tmp_path / "tiny", BERT), tmp_path / "text.txt", tmp_path / "out"
    corpus.write_text(" ".join(f"w{5 + number % 31}" for number in range(97)))
    line = ["scaling.py", "--model", str(model), "--corpus", str(corpus), "--sequences", "3", "--repeat", "1"]
    monkeypatch.setattr(sys, "argv", [*line, "--out", str(out)])
    assert scaling.main() == 0
    measured = json.loads((out / "scaling.json").read_text())
    pieces = measured["pieces"]
    assert all(value > 0 for value in pieces.values())
    assert pieces["bytes a token"] == corpus.stat().st_size / 97
    assert pieces["bytes to the device a sequence"] == 17 * 4 + 17**2
    # Norms of every position, means and deviations of 40 bins, in each of 3 layers.
    assert pieces["bytes from the device a sequence"] == 3 * 4 * (17 + 2 * 40)
    assert (out / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert scaling.markdown(measured) in capsys.readouterr().out


def test_a_checkpoint_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--model", str(tmp_path / "missing"), "--out", str(tmp_path)])
    assert scaling.main() == 2
    assert "no such folder" in capsys.readouterr().err


def test_the_readme_has_the_published_numbers():
    measured = json.loads(scaling.PUBLISHED.read_text())
    assert scaling.markdown(measured) in scaling.README.read_text()


def test_durations():
    durations = {0.0123: "12.3 ms", 1.5: "1.50 s", 400: "400.0 s", 700: "11.7 minutes", 7300: "2.0 hours"}
    assert {seconds: report.duration(seconds) for seconds in durations} == durations
    assert report.duration(3 * 86_400) == "3.0 days"
