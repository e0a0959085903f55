"""The style of the house's pictures: what a reader can read in them, and where something far off goes."""

import json
import math
import re

import pytest
import yaml
from pictures import check_style, tick_labels

from hf_ibnorm.report.plots import COLOURS, ForestLine, clip, crowd, figure, plot_forest, plot_losses, plot_runs
from hf_ibnorm.report.runs import Run
from hf_ibnorm.report.ticks import plain


def write_run(path, losses, norm="rmsnorm"):
    """A run directory with these training losses, gradient norms over six decades, and a validated end."""
    (path / "final").mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump({"seed": 0, "model": {"norm_type": norm, "norm_kwargs": {}}}))
    facts = {"init_sha": "", "parameters": 1, "device": "cpu", "cpu_count": 2, "versions": {"torch": "2"}, "date": ""}
    (path / "environment.json").write_text(json.dumps(facts))
    rows = [
        {
            "step": i,
            "loss": loss,
            "grad_norm": 10.0 ** (i % 7 - 3),
            "gain_movement": 0.1 * i,
            "tokens": 100 * i,
            "tokens_per_second": 50.0,
            "batch_sha": "",
        }
        for i, loss in enumerate(losses, 1)
    ]
    rows[-1]["eval_loss"] = losses[-1]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Run.read(path)


def falling(end, steps=30):
    return [end + 4 * math.exp(-i / 5) for i in range(steps)]


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        (r"$\mathdefault{10^{1}}$", "10"),
        (r"$\mathdefault{10^{-3}}$", "0.001"),
        (r"$\mathdefault{10^{7}}$", "10⁷"),
        (r"$\mathdefault{-10^{-12}}$", "−10⁻¹²"),
        (r"$\mathdefault{2\times10^{-1}}$", "0.2"),
        (r"$\mathdefault{6\times10^{5}}$", "6·10⁵"),
        (r"$\mathdefault{2^{-2}}$", "0.25"),
        (r"$\mathdefault{0}$", "0"),
        ("", ""),
        ("a $name$", "a $name$"),
    ],
)
def test_labels_of_logarithmic_axes_are_numbers(markup, text):
    assert plain(markup) == text


@pytest.mark.parametrize(
    ("options", "limits", "expected"),
    [
        ({"value": "log"}, (0.002, 300), {"0.01", "0.1", "1", "10", "100"}),
        ({"value": "log"}, (2.0, 7.0), {"2", "3", "4", "6"}),
        ({"value": "log", "base": 2}, (0.2, 10), {"0.25", "0.5", "1", "2", "4", "8"}),
        ({"value": "symlog", "linthresh": 1.0}, (-200, 200), {"−100", "−10", "0", "10", "100"}),
    ],
)
def test_logarithmic_axes_are_drawn_with_plain_labels(figures, tmp_path, options, limits, expected):
    with figure(tmp_path / "axes.png") as axes:
        axes.set_yscale(**options)
        axes.set_ylim(*limits)
    assert expected <= set(tick_labels(figures[0].axes[0].yaxis))


def test_runs_are_drawn_over_each_other_with_plain_gradient_norms(figures, tmp_path):
    runs = [write_run(tmp_path / f"{norm}$", falling(4.0), norm) for norm in ("rmsnorm", "ibnorm_l", "dyt")]
    plot_runs(runs, tmp_path / "runs.png")
    plot_losses(runs, tmp_path / "losses.png")
    labels = tick_labels(figures[0].axes[1].yaxis)
    assert {"0.001", "1", "1000"} & set(labels)
    for drawn in figures:
        (legend,) = drawn.legends
        assert [text.get_text() for text in legend.texts] == ["rmsnorm", "ibnorm_l", "dyt", "validation"]


def test_a_run_that_diverged_does_not_take_the_axis(figures, tmp_path):
    runs = [write_run(tmp_path / str(end), falling(end), f"norm{end}") for end in (4.0, 4.1, 4.2)]
    runs.append(write_run(tmp_path / "far", [900.0 + i for i in range(30)], "far"))
    plot_losses(runs, tmp_path / "losses.png")
    (axes,) = figures[0].axes
    assert axes.get_ylim()[1] < 12
    assert [text.get_text() for text in axes.texts] == ["far is off the scale: 901 to 929"]


@pytest.mark.parametrize(
    ("extents", "limits"),
    [
        ([(0, 1), (0.2, 1.2), (-0.1, 1.1), (9, 10)], (-0.1, 1.2)),
        ([(0, 1), (0.2, 1.2), (-0.1, 1.1), (9, 10), (-10, -9)], (-0.1, 1.2)),
        ([(0, 1), (0.2, 1.2), (1, 2), (2, 3)], (0, 3)),
        ([(0, 1), (9, 10)], (0, 10)),
        ([(0, 0), (0, 1)], (0, 1)),
        ([(0, 0), (0, 0), (5, 5)], (0, 5)),
        ([(1, 2)], (1, 2)),
    ],
)
def test_what_is_far_off_is_few_and_far(extents, limits):
    assert crowd(extents) == limits


def test_a_curve_that_is_mostly_beside_the_others_is_not_off(figures, tmp_path):
    curves = {name: [base + i / 9 for i in range(9)] for name, base in (("a", 0), ("b", 0.1), ("c", 0.2))}
    curves["once"] = [*curves["a"][:-1], 9.0]
    with figure(tmp_path / "curves.png") as axes:
        for values in curves.values():
            axes.plot(values)
        before = axes.get_ylim()
        clip(axes, {**curves, "empty": [math.nan]})
    assert axes.get_ylim() == before
    assert not axes.texts


def test_a_forest_has_its_outlier_at_the_edge_with_its_number(figures, tmp_path):
    estimates = [
        ForestLine(f"norm {i}", 0.01 * i, (0.01 * i - 0.1, 0.01 * i + 0.1), [0.01 * i], i == 2) for i in range(5)
    ]
    plot_forest([*estimates, ForestLine("far", 0.82, (0.71, 0.93))], tmp_path / "forest.png", "difference")
    (axes,) = figures[0].axes
    assert axes.get_xlim()[1] < 0.3
    assert [text.get_text() for text in axes.texts] == ["+0.82 (+0.71 to +0.93), off the scale"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [*(f"norm {i}" for i in range(5)), "far"]
    plot_forest(estimates[:1], tmp_path / "one.png", "difference")
    plot_forest([], tmp_path / "none.png", "difference")


def test_the_style_sees_text_that_is_cut_off(tmp_path, figures):
    with figure(tmp_path / "wide.png") as axes:
        axes.text(0.9, 0.5, "far too long for what is left of the picture", in_layout=False)
    with pytest.raises(AssertionError, match="far too long"):
        check_style(figures.pop())


def test_colours_differ_in_brightness():
    rgb = [[int(each, 16) / 255 for each in re.findall("..", colour[1:])] for colour in COLOURS]
    grey = sorted(0.299 * r + 0.587 * g + 0.114 * b for r, g, b in rgb)
    assert len(set(COLOURS)) == 10
    assert grey[-1] < 0.75, "or it is not seen on white"
