"""Drawing, files, manifest and gallery, through the command that users run."""

import json
import os
import re
import stat
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
from conftest import GPT2, random_tensors, write_folder
from matplotlib.figure import Figure

from jaxqkv.cli import main
from jaxqkv.errors import JaxqkvError
from jaxqkv.figures import gallery, style
from jaxqkv.figures.displays import Bars, Display, Image, Line, Lines, Table, head_grid
from jaxqkv.figures.registry import study
from jaxqkv.files import replacing


@pytest.fixture
def tiny(tmp_path):
    return str(write_folder(tmp_path / "tiny", GPT2))


@pytest.fixture
def draw(tmp_path, tiny):
    """`jaxqkv figures qkv-weights …` on a tiny checkpoint; the folder with its files."""

    def run(*arguments, status=0):
        line = ["figures", "qkv-weights", *arguments, "--out", str(tmp_path / "out"), "--model", tiny]
        assert main(line) == status
        return tmp_path / "out" / "qkv-weights"

    return run


def pixels(path):
    return matplotlib.image.imread(path)[..., :3]


class TestDisplays:
    def test_each_panel_shows_its_numbers(self):
        matrix = np.arange(6.0).reshape(2, 3)
        display = Display(
            arrays={},
            caption="",
            size=(8, 6),
            title="All",
            panels=[
                [
                    Image(values=matrix, vmin=-1, vmax=7, cmap="magma", vlines=(0.5,), tag="H0", colorbar="unit"),
                    Lines(
                        lines=[Line(x=np.arange(3), y=matrix[1], label="a", color=style.Q)],
                        title="T",
                        xlabel="X",
                        ylabel="Y",
                        ylim=(0, None),
                        xlim=(0, 2),
                        xticks=(0, 2),
                    ),
                ],
                [
                    Bars(heights=np.array([1, 4, 2]), edges=np.array([0, 1, 3, 4.0])),
                    Table(heading=("name", "n"), rows=[("a", "1"), ("bcd", "22")]),
                ],
            ],
        )
        figure = Figure()
        display.draw(figure)
        image, bar, lines, bars, table = figure.axes
        np.testing.assert_array_equal(image.images[0].get_array(), matrix)
        assert image.images[0].get_clim() == (-1, 7)
        assert image.images[0].get_cmap().name == "magma"
        assert bar.get_ylabel() == "unit"
        np.testing.assert_array_equal(lines.lines[0].get_ydata(), matrix[1])
        assert (lines.get_title(), lines.get_xlabel(), lines.get_ylabel()) == ("T", "X", "Y")
        assert lines.get_ylim()[0] == 0
        assert [text.get_text() for text in lines.get_legend().get_texts()] == ["a"]
        np.testing.assert_array_equal(bars.patches[0].get_data().values, [1, 4, 2])
        cells = {place: cell.get_text().get_text() for place, cell in table.tables[0].get_celld().items()}
        assert cells == {(0, 0): "name", (0, 1): "n", (1, 0): "a", (1, 1): "1", (2, 0): "bcd", (2, 1): "22"}
        assert figure.get_suptitle() == "All"

    def test_dense_points_are_drawn_as_pixels_in_vector_files(self):
        for points, rasterized in ((10, False), (5000, True)):
            figure = Figure()
            line = Line(x=np.arange(points), y=np.zeros(points), marker="o", linestyle="")
            Display(arrays={}, panels=[[Lines(lines=[line])]], caption="", size=(3, 2)).draw(figure)
            assert bool(figure.axes[0].lines[0].get_rasterized()) == rasterized

    def test_table_in_a_terminal(self):
        table = Table(heading=("name", "n"), rows=[("a", "1"), ("bcd", "22")])
        assert table.text() == "name   n\n----  --\na      1\nbcd   22"

    def test_head_grid(self):
        grids = {1: (1, 1), 7: (2, 4), 8: (2, 4), 12: (3, 4), 16: (4, 4), 20: (4, 5), 25: (5, 5)}
        assert {heads: head_grid(heads) for heads in grids} == grids


class TestFiles:
    def test_every_figure_of_the_study_is_drawn(self, draw):
        folder = draw("--dpi", "40")
        ids = list(study("qkv-weights").figures)
        assert sorted(p.name for p in folder.iterdir()) == sorted(
            [f"{id}.{kind}" for id in ids for kind in ("npz", "png")] + ["manifest.json"]
        )
        for id in ids:
            image = pixels(folder / f"{id}.png")
            assert image.std() > 0.02, f"{id} is blank"
            assert image[0, 0].min() == 1

    def test_formats_themes_and_resolution(self, draw):
        folder = draw("2a", "--format", "svg", "pdf", "--theme", "dark", "--dpi", "50")
        assert pixels(folder / "2a.png").shape[:2] == (170, 500)
        np.testing.assert_allclose(pixels(folder / "2a.png")[0, 0] * 255, [0x28, 0x2A, 0x2C], atol=1)
        svg = (folder / "2a.svg").read_text()
        assert "Embeddings dimensions" in svg
        assert svg.count("<image") >= 1
        assert (folder / "2a.pdf").read_bytes().startswith(b"%PDF")

    def test_the_same_command_makes_the_same_files(self, draw):
        folder = draw("5a", "--format", "svg", "pdf", "--dpi", "40")
        before = {path.name: path.read_bytes() for path in folder.glob("5a.*")}
        draw("5a", "--format", "svg", "pdf", "--dpi", "40")
        for name, content in before.items():
            if not name.endswith("npz"):  # a zip holds the time
                assert (folder / name).read_bytes() == content, name

    def test_manifest(self, draw, tiny):
        folder = draw("1", "2d", "--seed", "7", "--layer", "2", "--arrays-only")
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["study"] == "qkv-weights"
        assert manifest["layer"] == 2
        assert manifest["seed"] == 7
        assert manifest["dtype"] == "float32"
        assert manifest["precision"] == "highest"
        assert manifest["device"].startswith("cpu")
        assert set(manifest["versions"]) == {"jaxqkv", "jax", "jaxlib", "flax", "numpy"}
        assert set(manifest["seconds"]) == {"computing", "drawing"}
        assert manifest["command"].startswith("jaxqkv figures qkv-weights 1 2d --seed 7")
        (checkpoint,) = manifest["checkpoint"]
        assert checkpoint["checkpoint"] == tiny
        assert checkpoint["files"]["model.safetensors"].startswith("sampled-sha256:")
        assert manifest["figures"]["2d"]["files"] == ["2d.npz"]

    def test_figures_of_earlier_runs_stay(self, draw):
        folder = draw("1", "2d", "--arrays-only")
        draw("4b", "--arrays-only", "--seed", "5")
        figures = json.loads((folder / "manifest.json").read_text())["figures"]
        assert {id: entry["run"]["seed"] for id, entry in figures.items()} == {"1": 0, "2d": 0, "4b": 5}
        (folder / "1.npz").unlink()
        draw("4b", "--arrays-only")
        assert set(json.loads((folder / "manifest.json").read_text())["figures"]) == {"2d", "4b"}
        (folder / "manifest.json").write_text("{ broken")
        draw("4b", "--arrays-only")
        assert set(json.loads((folder / "manifest.json").read_text())["figures"]) == {"4b"}

    def test_gallery(self, draw):
        folder = draw("1", "2d", "--dpi", "40")
        page = (folder.parent / "index.html").read_text()
        links = []

        class Links(HTMLParser):
            def handle_starttag(self, tag, attributes):
                links.extend(value for key, value in attributes if key in ("href", "src"))

        Links().feed(page)
        assert {"qkv-weights/1.png", "qkv-weights/1.npz", "qkv-weights/2d.png"} <= set(links)
        assert all((folder.parent / link).is_file() for link in links)
        assert "sample standard deviation of the weights of each layer of tiny" in page
        assert page.index('id="qkv-weights-1"') < page.index('id="qkv-weights-2d"')
        assert not re.search(r"https?://", page)

    def test_gallery_escapes_what_comes_from_outside(self, tmp_path):
        evil = write_folder(tmp_path / "<script>alert(1)<", GPT2)
        main(["figures", "qkv-weights", "2d", "--arrays-only", "--out", str(tmp_path / "out"), "--model", str(evil)])
        page = (tmp_path / "out" / "index.html").read_text()
        assert "<script>" not in page
        assert "&lt;script&gt;alert(1)" in page

    def test_files_are_readable_as_the_umask_says(self, draw):
        old = os.umask(0o027)
        try:
            folder = draw("1", "--arrays-only")
        finally:
            os.umask(old)
        assert stat.S_IMODE((folder / "1.npz").stat().st_mode) == 0o640


class TestWholeOrNotAtAll:
    def test_an_interrupted_write_leaves_the_earlier_file(self, tmp_path):
        path = tmp_path / "x.npz"
        path.write_bytes(b"earlier")

        def write():
            with replacing(path) as file:
                file.write(b"half")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write()
        assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]
        assert path.read_bytes() == b"earlier"

    def test_an_interrupted_run_keeps_what_it_finished(self, draw, monkeypatch, capsys):
        folder = draw("2a", "--dpi", "40")
        before = {path.name: path.read_bytes() for path in folder.glob("2a.*")}
        original = gallery.draw

        def interrupt_2a(display, *arguments):
            if "weights" in display.arrays:
                raise KeyboardInterrupt
            original(display, *arguments)

        monkeypatch.setattr(gallery, "draw", interrupt_2a)
        draw("1", "2a", "2d", "--dpi", "40", "--layer", "2", status=130)
        assert {path.name: path.read_bytes() for path in folder.glob("2a.*")} == before
        assert not (folder / "2d.npz").exists()
        figures = json.loads((folder / "manifest.json").read_text())["figures"]
        assert {id: entry["run"]["layer"] for id, entry in figures.items()} == {"1": 2, "2a": 1}
        assert not list(folder.glob(".*"))
        assert "interrupted" in capsys.readouterr().err

    def test_pictures_of_earlier_runs_do_not_stay_beside_new_arrays(self, draw):
        folder = draw("1", "--dpi", "40", "--format", "svg")
        assert {path.name for path in folder.glob("1.*")} == {"1.npz", "1.png", "1.svg"}
        draw("1", "--arrays-only")
        assert {path.name for path in folder.glob("1.*")} == {"1.npz"}

    def test_a_manifest_of_another_make_is_replaced(self, draw):
        folder = draw("1", "--arrays-only")
        for content in ('{"figures": []}', '{"figures": {"1": 3}}', "[]", "3", "null"):
            (folder / "manifest.json").write_text(content)
            draw("1", "--arrays-only")
            assert set(json.loads((folder / "manifest.json").read_text())["figures"]) == {"1"}

    def test_names_are_not_read_as_mathematics(self, tmp_path):
        folder = str(write_folder(tmp_path / r"m$\bad$", GPT2))
        line = ["figures", "qkv-weights", "1", "2b", "2c", "3", "--dpi", "40", "--out", str(tmp_path / "out")]
        assert main([*line, "--model", folder]) == 0

    def test_weights_that_are_not_finite_are_named_where_no_histogram_is_possible(self, tmp_path, capsys):
        tensors = random_tensors(GPT2)
        tensors["h.1.attn.c_attn.weight"][3, 5] = np.nan
        folder = str(write_folder(tmp_path / "broken", GPT2, tensors))
        line = ["figures", "qkv-weights", "2b", "--arrays-only", "--out", str(tmp_path / "out"), "--model", folder]
        assert main(line) == 2
        assert "1 of 1,225 values are NaN or infinite, so there is no histogram" in capsys.readouterr().err

    def test_a_folder_that_cannot_be_written_is_an_error_before_any_work(self, tmp_path, tiny, monkeypatch, capsys):
        (tmp_path / "file").write_text("in the way")
        monkeypatch.setattr("jaxqkv.studies.qkv_weights.Run.__init__", lambda self, options: pytest.fail("worked"))
        assert main(["figures", "qkv-weights", "--out", str(tmp_path / "file"), "--model", tiny]) == 2
        assert "cannot be written (Not a directory); choose another folder with --out" in capsys.readouterr().err


def test_registry_names_the_nearest():
    with pytest.raises(JaxqkvError, match=r"no study qkv-weight; did you mean qkv-weights\?"):
        study("qkv-weight")
    with pytest.raises(JaxqkvError, match=r"qkv-weights has no figure 5z; did you mean 5"):
        study("qkv-weights").select(["5z"])
    with pytest.raises(JaxqkvError, match=r"no figure nothing; there is 1, 2a"):
        study("qkv-weights").select(["nothing"])
    assert [spec.id for spec in study("qkv-weights").select(["6", "2a"])] == ["2a", "6"]
