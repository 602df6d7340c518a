"""The benchmark compares like with like: all three sides give the same numbers. Its timings are not tested."""

import json

import benchmark
import numpy as np
import pytest


def test_all_sides_agree_and_the_files_say_so(tmp_path, capsys):
    assert benchmark.main(["--quick", "--repeat", "1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "benchmark.json").read_text())
    cases = {each["case"]: each for each in results["cases"]}
    assert len(cases) == 10
    for name, each in cases.items():
        assert set(each["difference"]) == {"tuned", "notebook"}
        # The distance is counted in cells of 2e-6, relative to distances of a hundredth.
        limit = 1e-4 if name == "distance from normal" else 1e-5
        assert max(each["difference"].values()) < limit, name
        median = each["median seconds"]
        assert each["faster"]["tuned"] == pytest.approx(median["tuned"] / median["jaxqkv"])
    assert results["versions"].keys() >= {"jaxqkv", "jax", "torch", "transformers"}
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(name in printed for name in cases)


def test_a_wrong_answer_shows(monkeypatch):
    (case,) = [case for case in benchmark.kernel_cases(small=True) if case.name == "head pairs"]
    right = case.sides["tuned"]
    case.sides["tuned"] = lambda: 1.01 * right()
    assert benchmark.measure(case, repeat=1, top=1.0)["difference"]["tuned"] == pytest.approx(0.01, rel=0.01)
    case.sides["tuned"] = lambda: np.zeros(3)
    with pytest.raises(SystemExit, match=r"head pairs: jaxqkv gives \(2, 100\), tuned \(3,\)"):
        benchmark.measure(case, repeat=1, top=1.0)


def test_the_work_of_a_forward_pass_is_counted():
    """As a loop over its products, for the shape of demo-gpt2."""
    case = benchmark.forward_case("x", "demo-gpt2", batch=3, pos=7)
    width, inner, layers = 128, 512, 8
    total = 0
    for layer in range(layers):
        total += 3 * 2 * 7 * width * width
        if layer < layers - 1:
            total += 2 * 2 * 7 * 7 * width + 2 * 7 * width * width + 2 * 2 * 7 * width * inner
    assert case.flops == 3 * total


def test_no_such_case(capsys):
    with pytest.raises(SystemExit) as exit:
        benchmark.main(["--cases", "nothing like it"])
    assert exit.value.code == 2
    assert "no case has that in its name" in capsys.readouterr().err
