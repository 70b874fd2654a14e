import json

import numpy as np
import pytest
from PIL import Image

from dset_d2.tools import plot_curves


def write_run(folder, offset=0.0, count=12, tail="") -> str:
    """Losses at every tenth iteration, AP at every fortieth, as Detectron2 logs them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for iteration in range(9, 10 * count, 10):
        row = {"iteration": iteration, "total_loss": 20 / (1 + iteration) + offset}
        if iteration % 40 == 39:
            row |= {"bbox/AP": 0.1 * iteration + offset, "bbox/AP50": float("nan")}
        lines.append(json.dumps(row))
    (folder / "metrics.json").write_text("\n".join(lines) + "\n" + tail)
    return str(folder)


def run(tmp_path, runs, *options):
    output = tmp_path / "out" / "curves.png"
    plot_curves.main(["--runs", *runs, "--output", str(output), *options])
    return Image.open(output)


def load(runs, *metrics):
    return plot_curves.load_runs([plot_curves.named_run(text) for text in runs], metrics)


def test_figure(tmp_path, capsys):
    runs = [f"dense={write_run(tmp_path / 'a')}", f"dense={write_run(tmp_path / 'b', 1.0)}"]
    runs.append(f"sparse={write_run(tmp_path / 'c', 3.0)}")
    image = run(tmp_path, runs, "--epoch-iters", "40")
    assert image.size == (3 * 960, 600)
    assert len(np.unique(np.asarray(image).reshape(-1, 4), axis=0)) > 50
    assert "drawn to" in capsys.readouterr().out
    assert run(tmp_path, runs, "--metrics", "total_loss").size == (960, 600)


def test_panels_curves_and_shades(tmp_path):
    runs = [f"dense={write_run(tmp_path / 'a')}", f"dense={write_run(tmp_path / 'b', 1.0)}"]
    runs.append(f"sparse={write_run(tmp_path / 'c', 3.0)}")
    figure = plot_curves.draw(load(runs, "total_loss", "bbox/AP"), epoch_iters=40)
    assert [axes.get_title() for axes in figure.axes] == ["total_loss", "bbox/AP, %"]
    axes = figure.axes[1]
    dense, sparse = axes.get_lines()
    for label, line in zip(axes.texts, (dense, sparse), strict=True):
        assert tuple(label.get_color()) == tuple(line.get_color())
        assert label.xy == (119, line.get_ydata()[-1])  # its end
    assert [x.get_text() for x in axes.texts] == ["dense (mean of 2)", "sparse"]
    assert axes.texts[0].xyann[1] < axes.texts[1].xyann[1]
    np.testing.assert_array_equal(dense.get_xdata(), [39, 79, 119])
    np.testing.assert_allclose(dense.get_ydata(), np.array([3.9, 7.9, 11.9]) + 0.5)
    np.testing.assert_allclose(sparse.get_ydata(), np.array([3.9, 7.9, 11.9]) + 3)
    (shade,) = axes.collections
    assert tuple(shade.get_facecolor()[0][:3]) == tuple(dense.get_color())
    low, high = shade.get_paths()[0].get_extents().intervaly
    assert low == pytest.approx(3.9) and high == pytest.approx(12.9)
    (top,) = axes.child_axes
    figure.canvas.draw()
    assert top.get_xlabel() == "epoch" and axes.get_xlabel() == "iteration"
    left, right = axes.get_xlim()
    np.testing.assert_allclose(top.get_xlim(), ((left + 1) / 40, (right + 1) / 40))


def test_six_curves_look_different():
    figure = plot_curves.draw(
        {"bbox/AP": {f"{i}": (np.arange(3), np.full((1, 3), 5.0)) for i in range(6)}}
    )
    lines = figure.axes[0].get_lines()
    assert len({tuple(line.get_color()) for line in lines}) == 6
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 6


def test_labels_stand_apart():
    heights = plot_curves.apart([0.5, 0.1, 0.5, 0.52], gap=0.05)
    assert heights[1] == pytest.approx(0.1)
    others = sorted(heights[:1] + heights[2:])
    np.testing.assert_allclose(np.diff(others), 0.05)
    assert np.mean(others) == pytest.approx(np.mean([0.5, 0.5, 0.52]))
    assert plot_curves.apart([], gap=0.05) == []


def test_half_written_lines_are_left_out_with_a_warning(tmp_path, capsys):
    folder = write_run(tmp_path / "killed", tail='{"iteration": 129, "total_lo')
    (iterations, _) = load([f"killed={folder}"], "total_loss")["total_loss"]["killed"]
    assert iterations[-1] == 119
    assert f"{folder}/metrics.json: left out broken lines: 13" in capsys.readouterr().err


def test_resumed_runs_replace_what_they_repeat(tmp_path):
    again = [{"iteration": 94, "total_loss": 5.0}, {"iteration": 104, "total_loss": 6.0}]
    tail = "".join(json.dumps(row) + "\n" for row in again)
    folder = write_run(tmp_path / "resumed", tail=tail)
    iterations, values = load([f"x={folder}"], "total_loss")["total_loss"]["x"]
    assert iterations.tolist() == [*range(9, 94, 10), 94, 104]
    assert values[0, -2:].tolist() == [5.0, 6.0]


def test_seeds_are_averaged_where_all_have_values(tmp_path, capsys):
    runs = [f"x={write_run(tmp_path / 'a')}", f"x={write_run(tmp_path / 'b', count=7)}"]
    iterations, values = load(runs, "total_loss")["total_loss"]["x"]
    assert iterations[-1] == 69 and values.shape == (2, 7)
    assert "drawn to iteration 69 only; its runs end at 69, 119" in capsys.readouterr().err

    shifted = tmp_path / "c" / "metrics.json"
    shifted.parent.mkdir()
    shifted.write_text('{"iteration": 4, "total_loss": 1}')
    with pytest.raises(
        plot_curves.UsageError, match="'x' have no iteration in common .* 'total_loss'"
    ):
        load([*runs, f"x={shifted.parent}"], "total_loss")


@pytest.mark.parametrize(
    "content, options, message",
    [
        (None, [], "metrics.json: cannot be read: No such file"),
        ("", [], "metrics.json: holds no line of metrics"),
        ("no json\n[1]\n{}", [], "metrics.json: holds no line of metrics"),
        ('{"iteration": 9, "lr": 1}', ["--metrics", "bbox/AP"], "metric 'bbox/AP'; there is: lr"),
        ('{"iteration": 9, "lr": "x"}', ["--metrics", "lr"], "metric 'lr' is 'x' at iteration 9"),
        ('{"iteration": 9}', ["--epoch-iters", "0"], "--epoch-iters 0"),
        ('{"iteration": 9}', ["--output", "curves.doc"], "cannot write files of type 'doc'"),
        ('{"iteration": 9}', ["--runs", "folder"], "'folder' is not of the form name=DIR"),
    ],
)
def test_errors_say_what_is_wrong(tmp_path, content, options, message, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    if content is not None:
        (folder / "metrics.json").write_text(content)
    with pytest.raises(SystemExit) as error:
        run(tmp_path, [f"x={folder}"], *options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
