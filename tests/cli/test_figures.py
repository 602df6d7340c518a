"""Drawing, files, manifest and gallery, through the command that users run."""

import json
import os
import re
import shutil
import stat
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
from conftest import GPT2, random_tensors, write_folder
from matplotlib.figure import Figure

from jaxqkv.cli.main import main
from jaxqkv.errors import JaxqkvError
from jaxqkv.figures import drawers, style
from jaxqkv.figures.displays import Display, head_grid
from jaxqkv.figures.distributions import Bars, Dendrogram, Pie, StackedBars, Violins
from jaxqkv.figures.panels import Image, Line, Lines
from jaxqkv.figures.tables import Table
from jaxqkv.pages import gallery
from jaxqkv.runtime.files import replacing
from jaxqkv.studies.registry import studies, study


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("model") / "tiny", GPT2))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, tiny):
    """Returns where all figures of `qkv-weights` were drawn."""
    out = tmp_path_factory.mktemp("drawn")
    assert main(["figures", "qkv-weights", "--dpi", "40", "--out", str(out), "--model", tiny]) == 0
    return out


@pytest.fixture
def folder(drawn, tmp_path):
    """A copy of the folder with all figures, as an earlier run of `draw` leaves it."""
    return shutil.copytree(drawn, tmp_path / "out") / "qkv-weights"


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

    def test_table_with_several_columns_at_the_left(self):
        table = Table(heading=("a", "name", "n"), rows=[("x", "y", "1"), ("x", "yyyyy", "22")], left=2, wide=True)
        assert table.text() == "a  name    n\n-  -----  --\nx  y       1\nx  yyyyy  22"

    def test_a_wide_panel_has_its_row_alone_and_the_legend_is_one(self):
        line = Line(x=np.arange(3), y=np.arange(3), label="a", color=0.5)
        lines = Lines(lines=[line])
        table = Table(heading=("a",), rows=[("b",)], wide=True)
        figure = Figure(layout="constrained")
        Display(arrays={}, panels=[[table], [lines, lines]], caption="", size=(6, 4), heights=[1, 3], legend=True).draw(
            figure
        )
        spans = [axes.get_subplotspec().colspan for axes in figure.axes]
        assert [list(span) for span in spans] == [[0, 1], [0], [1]]
        assert figure.axes[0].get_gridspec().get_height_ratios() == [1, 3]
        assert [axes.get_legend() for axes in figure.axes] == [None] * 3
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["a"]

    def test_a_number_is_a_place_on_the_colour_map(self):
        figure = Figure()
        line = Line(x=np.arange(3), y=np.arange(3), color=0.25)
        Display(arrays={}, panels=[[Lines(lines=[line], cmap="viridis")]], caption="", size=(3, 2)).draw(figure)
        assert figure.axes[0].lines[0].get_color() == matplotlib.colormaps["viridis"](0.25)

    def test_pie_bars_and_trees_show_their_numbers(self):
        from scipy.cluster.hierarchy import linkage

        pie = Pie(values=[1, 3, 96], names=["a", "b", "c"], colors=["r", "g", "b"])
        bars = StackedBars(x=np.arange(2), heights=np.array([[1, 2], [5, 7.0]]), names=["a", "b"], colors=["r", "g"])
        tree = linkage(np.array([[0.0], [1], [10]]), "ward")
        curve = Line(x=np.arange(2), y=np.array([3, 4]), color="r", label="normal")
        histogram = Bars(heights=np.ones(2), edges=np.arange(3), label="weights", curve=curve, note="skewed")
        figure = Figure()
        panels = [[pie, bars], [Dendrogram(linkage=tree, color="k"), histogram]]
        Display(arrays={}, panels=panels, caption="", size=(6, 4)).draw(figure)
        pie, bars, tree_axes, histogram = figure.axes
        angles = [wedge.theta2 - wedge.theta1 for wedge in pie.patches]
        np.testing.assert_allclose(np.abs(angles), [3.6, 10.8, 345.6], rtol=1e-5)
        labels = [text.get_text() for text in pie.get_legend().get_texts()]
        assert labels == ["a (1.00%)", "b (3.00%)", "c (96.00%)"]
        assert [(patch.get_y(), patch.get_height()) for patch in bars.patches] == [(0, 1), (0, 2), (1, 5), (2, 7)]
        tops = sorted(max(line.get_ydata()) for line in tree_axes.lines)
        np.testing.assert_allclose(tops, tree[:, 2])
        assert sorted(label.get_text() for label in tree_axes.get_xticklabels()) == ["0", "1", "2"]
        np.testing.assert_array_equal(histogram.lines[0].get_ydata(), [3, 4])
        assert [text.get_text() for text in histogram.texts] == ["skewed"]

    def test_words_in_cells_are_readable_and_lines_are_between_them(self):
        image = Image(values=np.array([[0.0, 10, 4]]), texts=[["a", "b", "c"]], cells=True, xticks=(0, 1, 2))
        figure = Figure()
        Display(arrays={}, panels=[[image]], caption="", size=(3, 2)).draw(figure)
        (axes,) = figure.axes
        words = {text.get_text(): (text.get_position(), text.get_color()) for text in axes.texts}
        assert words == {"a": ((0, 0), "w"), "b": ((1, 0), "k"), "c": ((2, 0), "w")}
        assert axes.get_xticks(minor=True).tolist() == [0.5, 1.5]
        assert axes.get_yticks(minor=True).tolist() == []

    def test_ticks_of_an_image_are_whole_numbers(self):
        figure = Figure()
        image = Image(values=np.zeros((2, 2)), integer_x=True, integer_y=True)
        Display(arrays={}, panels=[[image, Image(values=np.zeros((2, 2)))]], caption="", size=(6, 2)).draw(figure)
        whole, others = ([ticks % 1 for ticks in (axes.get_xticks(), axes.get_yticks())] for axes in figure.axes)
        assert not any(each.any() for each in whole)
        assert others[0].any()

    def test_what_curves_are_drawn_over(self):
        line = Line(x=np.arange(3), y=np.array([1.0, 10, 100]), error=np.ones(3))
        options = {"integer_x": True, "log_y": True, "grid": True, "zero_x": True, "zero_y": True}
        figure = Figure()
        panel = Lines(lines=[line], yticks=(1, 100), **options)
        Display(arrays={}, panels=[[panel]], caption="", size=(3, 2)).draw(figure)
        (axes,) = figure.axes
        curve, vertical, horizontal = (axes.lines[index] for index in (0, -2, -1))
        np.testing.assert_array_equal(curve.get_ydata(), line.y)
        assert (set(vertical.get_xdata()), set(horizontal.get_ydata())) == ({0}, {0})
        assert axes.get_yscale() == "log"
        assert axes.get_yticks().tolist() == [1, 100]
        assert axes.xaxis.get_gridlines()[0].get_linestyle() == "--"

    def test_every_value_of_a_sample_is_a_point(self):
        samples = [np.arange(5.0), np.arange(9.0) + 10]
        options = {"samples": samples, "names": ["a", "b"], "colors": ["r", "g"], "zero_y": True}
        figure = Figure()
        panels = [[Violins(**options, seed=seed) for seed in (0, 0, 1)]]
        Display(arrays={}, panels=panels, caption="", size=(6, 4)).draw(figure)
        for axes in figure.axes:
            *points, zero = axes.lines
            for place, line, sample in zip((1, 2), points, samples, strict=True):
                np.testing.assert_array_equal(line.get_ydata(), sample)
                assert (np.abs(line.get_xdata() - place) < 0.3).all()
            assert set(zero.get_ydata()) == {0}
        first, again, other = (axes.lines[0].get_xdata() for axes in figure.axes)
        np.testing.assert_array_equal(first, again)
        assert (first != other).all()

    def test_boxes_and_violins(self):
        samples = [np.arange(5.0), np.arange(9.0) + 10]
        options = {"samples": samples, "names": ["a", "b"], "colors": ["r", "g"], "seed": 0, "points": False}
        figure = Figure()
        panels = [[Violins(**options, boxes=True), Violins(**options)]]
        Display(arrays={}, panels=panels, caption="", size=(6, 4)).draw(figure)
        boxes, violins = figure.axes
        medians = {line.get_ydata()[0] for line in boxes.lines if len(set(line.get_ydata())) == 1}
        assert {2, 14} <= medians
        assert len(violins.collections) == 2 + 3  # two bodies; means are not drawn
        assert not violins.lines
        assert [label.get_text() for label in boxes.get_xticklabels()] == ["a", "b"]

    def test_head_grid(self):
        grids = {1: (1, 1), 7: (2, 4), 8: (2, 4), 12: (3, 4), 16: (4, 4), 20: (4, 5), 25: (5, 5)}
        assert {heads: head_grid(heads) for heads in grids} == grids


class TestFiles:
    def test_every_figure_of_the_study_is_drawn(self, folder):
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
        assert pixels(folder / "2a.png").shape[:2] == (185, 500)
        np.testing.assert_allclose(pixels(folder / "2a.png")[0, 0] * 255, [0x28, 0x2A, 0x2C], atol=1)
        svg = (folder / "2a.svg").read_text()
        assert "Embeddings dimensions" in svg
        assert svg.count("<image") >= 1
        assert (folder / "2a.pdf").read_bytes().startswith(b"%PDF")

    def test_the_same_command_makes_the_same_files(self, draw):
        folder = draw("2b", "--format", "svg", "pdf", "--dpi", "20")
        before = {path.name: path.read_bytes() for path in folder.glob("2b.*")}
        draw("2b", "--format", "svg", "pdf", "--dpi", "20")
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

    def test_gallery(self, folder):
        page = (folder.parent / "index.html").read_text()
        links, places = [], []

        class Links(HTMLParser):
            def handle_starttag(self, tag, attributes):
                links.extend(value for key, value in attributes if key in ("href", "src"))
                places.extend(f"#{value}" for key, value in attributes if key == "id")

        Links().feed(page)
        assert {"qkv-weights/1.png", "qkv-weights/1.npz", "qkv-weights/2d.png", "#qkv-weights-2d"} <= set(links)
        files = [link for link in links if link not in (*places, "data:,")]
        assert all((folder.parent / link).is_file() for link in files)
        assert "sample standard deviation of the weights of each layer of tiny" in page
        assert page.index('id="qkv-weights-1"') < page.index('id="qkv-weights-2d"')
        assert not re.search(r"https?://", page)

    def test_a_picture_that_is_none_breaks_no_page(self, folder):
        (folder / "1.png").unlink()
        (folder / "1.png").mkdir()
        (folder / "2d.png").write_bytes(b"")
        page = gallery.write_gallery(folder.parent, studies()).read_text()
        drawn = [id for id in study("qkv-weights").figures if id not in ("1", "2d")]
        assert re.findall(r'<img src="([^"]*)"', page) == [f"qkv-weights/{id}.png" for id in drawn]
        assert page.count("no picture was drawn") == 2

    def test_gallery_escapes_what_comes_from_outside(self, tmp_path):
        evil = write_folder(tmp_path / "<script>alert(1)<", GPT2)
        main(["figures", "qkv-weights", "2d", "--arrays-only", "--out", str(tmp_path / "out"), "--model", str(evil)])
        page = (tmp_path / "out" / "index.html").read_text()
        assert "<script>alert(1)" not in page
        assert "&lt;script&gt;alert(1)" in page

    def test_of_a_manifest_the_gallery_takes_texts_alone(self, folder):
        evil = "\"'><img src=x onerror=alert(1)><!--"
        entry = dict.fromkeys(("title", "caption", "command"), evil) | {"files": [evil, "javascript:alert(1)"]}
        manifest = {"figures": {"1": entry, "2d": entry | {"title": 3}, "2b": 7, evil: entry}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        page = gallery.write_gallery(folder.parent, studies()).read_text()
        tags, links = [], set()

        class Tags(HTMLParser):
            def handle_starttag(self, tag, attributes):
                tags.append(tag)
                links.update(value for key, value in attributes if key in ("href", "src"))
                assert not any(key.startswith("on") for key, _ in attributes)

        Tags().feed(page)
        assert links == {"qkv-weights/1.npz", "qkv-weights/1.png", "data:,", "#qkv-weights", "#qkv-weights-1"}
        assert tags.count("img") == 2  # the figure's, and the large one

    def test_the_gallery_keeps_each_picture_s_place(self, folder):
        height, width = pixels(folder / "2a.png").shape[:2]
        assert f'width="{width}" height="{height}"' in (folder.parent / "index.html").read_text()

    def test_each_figure_has_the_command_that_draws_it(self, draw):
        folder = draw("1", "2d", "--seed", "1", "--arrays-only")
        figures = json.loads((folder / "manifest.json").read_text())["figures"]
        for id in ("1", "2d"):
            assert figures[id]["command"].startswith(f"jaxqkv figures qkv-weights {id} --seed 1 --arrays-only --out ")
            assert figures[id]["run"]["command"].startswith("jaxqkv figures qkv-weights 1 2d --seed 1")
        page = (folder.parent / "index.html").read_text()
        assert re.findall(r"<code>jaxqkv figures qkv-weights (\S+) --seed 1", page) == ["1", "2d"]

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

    def test_an_interrupted_run_keeps_what_it_finished(self, draw, folder, monkeypatch, capsys):
        (folder / "2d.npz").unlink()
        before = {path.name: path.read_bytes() for path in folder.glob("2a.*")}
        original = drawers.pictures

        def interrupt_2a(display, *arguments):
            assert not list(folder.glob(".*"))  # while it is drawn, nothing is half-written
            if "weights" in display.arrays:
                raise KeyboardInterrupt
            return original(display, *arguments)

        monkeypatch.setattr(drawers, "pictures", interrupt_2a)
        draw("1", "2a", "2d", "--dpi", "40", "--layer", "2", status=130)
        assert {path.name: path.read_bytes() for path in folder.glob("2a.*")} == before
        assert not (folder / "2d.npz").exists()
        figures = json.loads((folder / "manifest.json").read_text())["figures"]
        layers = dict.fromkeys(study("qkv-weights").figures, 1) | {"1": 2}
        del layers["2d"]
        assert {id: entry["run"]["layer"] for id, entry in figures.items()} == layers
        assert not list(folder.glob(".*"))
        assert "interrupted" in capsys.readouterr().err

    def test_pictures_of_earlier_runs_do_not_stay_beside_new_arrays(self, draw, folder):
        (folder / "1.svg").write_text("of another run")
        assert {path.name for path in folder.glob("1.*")} == {"1.npz", "1.png", "1.svg"}
        draw("1", "--arrays-only")
        assert {path.name for path in folder.glob("1.*")} == {"1.npz"}

    def test_a_manifest_of_another_make_is_replaced(self, draw, capsys):
        folder = draw("1", "--arrays-only")
        for content in ('{"figures": []}', '{"figures": {"1": 3}}', "[]", "3", "null"):
            (folder / "manifest.json").write_text(content)
            draw("1", "--arrays-only")
            assert set(json.loads((folder / "manifest.json").read_text())["figures"]) == {"1"}
            said = f"jaxqkv: {folder}/manifest.json lists no figures that can be read; it is begun anew\n"
            assert capsys.readouterr().err == said

    def test_weights_that_are_not_finite_are_named_where_no_histogram_is_possible(self, tmp_path, capsys):
        tensors = random_tensors(GPT2)
        tensors["h.1.attn.c_attn.weight"][3, 5] = np.nan
        folder = str(write_folder(tmp_path / "broken", GPT2, tensors))
        line = ["figures", "qkv-weights", "2b", "--arrays-only", "--out", str(tmp_path / "out"), "--model", folder]
        assert main(line) == 2
        assert "1 of 1,225 values are NaN or infinite, so there is no histogram" in capsys.readouterr().err

    def test_a_folder_that_cannot_be_written_is_an_error_before_any_work(self, tmp_path, tiny, monkeypatch, capsys):
        (tmp_path / "file").write_text("in the way")
        monkeypatch.setattr(
            "jaxqkv.studies.qkv_weights.run.QKVWeightsRun.__init__", lambda *arguments: pytest.fail("worked")
        )
        assert main(["figures", "qkv-weights", "--out", str(tmp_path / "file"), "--model", tiny]) == 2
        assert "cannot be written (Not a directory); choose another folder with --out" in capsys.readouterr().err


def test_registry_names_the_nearest():
    with pytest.raises(JaxqkvError, match=r"no study qkv-weight; did you mean qkv-weights or weight-tour\?"):
        study("qkv-weight")
    with pytest.raises(JaxqkvError, match=r"qkv-weights has no figure 5z; did you mean 5"):
        study("qkv-weights").select(["5z"])
    with pytest.raises(JaxqkvError, match=r"no figure nothing; there is 1, 2a"):
        study("qkv-weights").select(["nothing"])
    assert [spec.id for spec in study("qkv-weights").select(["6", "2a"])] == ["2a", "6"]
