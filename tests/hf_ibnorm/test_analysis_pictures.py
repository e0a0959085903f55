"""Pictures of the diagnostics: what is drawn, what is left out, and no file where nothing is known."""

import importlib.util
import math
import random
import sys
from dataclasses import replace

import pytest
import torch
from helpers import FAMILIES, tokens
from pictures import tick_labels

from hf_ibnorm import apply_norm
from hf_ibnorm.analysis import qq, watch
from hf_ibnorm.analysis.information import Estimate
from hf_ibnorm.analysis.noise import NoiseRobustness
from hf_ibnorm.analysis.plane import PlanePoint
from hf_ibnorm.analysis.show import pictures, plane_pictures
from hf_ibnorm.analysis.show.axes import NAMED, short_site
from hf_ibnorm.norms import all_measures
from hf_ibnorm.report import plots

SITES = ["model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"]
NOTHING = Estimate(None, None, None, 5, "5 samples")


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Fewer pixels, to be fast."""
    monkeypatch.setitem(plots.SETTINGS, "figure.dpi", 40)


@pytest.fixture
def measured(stock_model):
    """A model's statistics, with a norm of its own or another."""

    def measure(norm=None, family="llama"):
        model = stock_model(family)
        if norm:
            apply_norm(model, norm)
        with watch(model) as statistics, torch.no_grad():
            model(tokens())
        return statistics.result()

    return measure


def titles(figure):
    return [axes.get_title(loc="left").replace("\n", " ") for axes in figure.axes]


def curves(axes):
    """What was drawn by name: label → values."""
    return {line.get_label(): line.get_ydata() for line in axes.lines if not line.get_label().startswith("_")}


def is_png(path):
    return path.read_bytes()[:4] == b"\x89PNG"


def test_profiles_have_a_panel_for_each_quantity_and_a_curve_for_each_model(measured, figures, tmp_path):
    models = {name: measured(name) for name in ("ibnorm_t", "layernormalnorm")} | {"stock": measured()}
    assert pictures.draw_profiles(models, tmp_path / "profiles.png")
    assert is_png(tmp_path / "profiles.png")
    # 32 rows are too few for the effective rank of 32 channels.
    assert titles(figures[0]) == [each.title for each in pictures.COMMON[:-1]]
    for axes in figures[0].axes:
        assert set(models) <= set(curves(axes)) <= {*models, "Gaussian"}
    kurtosis = figures[0].axes[titles(figures[0]).index("excess kurtosis, after")]
    expected = [site["after"]["excess_kurtosis"] for site in models["stock"].values()]
    assert curves(kurtosis)["stock"].tolist() == pytest.approx(expected)
    assert list(curves(kurtosis)["Gaussian"]) == [0, 0]
    ticks = [label.get_text() for label in figures[0].axes[-1].get_xticklabels()]
    assert ticks == ["0.input", "0.post", "1.input", "1.post", "norm"]
    assert [text.get_text() for text in figures[0].legends[0].texts] == [*models, "Gaussian"]


def test_what_belongs_to_a_norm_is_drawn_for_models_that_have_it(measured, figures, tmp_path):
    models = {"stock": measured(), "ib": measured("ibnorm_l"), "normal": measured("layernormalnorm")}
    assert pictures.draw_norm_profiles(models, tmp_path / "norm.png")
    measures = all_measures().values()
    assert titles(figures[0]) == [f"{each.title}, %" if each.percent else each.title for each in measures]
    drawn = [set(curves(axes)) - {"no transformation"} for axes in figures[0].axes]
    assert drawn == [{"ib"}] * 3 + [{"normal"}] * 3
    # A model looks the same in every picture.
    assert figures[0].axes[0].lines[0].get_color() == pictures.look(1)[0]
    assert not pictures.draw_norm_profiles({"stock": measured()}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_none_is_a_gap_and_0_is_not_on_a_logarithmic_axis(measured, figures, tmp_path):
    sites = measured()
    first, second, *_ = sites.values()
    first["after"]["skewness"] = None
    second["before"]["variance"] = 0.0
    second["after"] = None
    pictures.draw_profiles({"a": sites}, tmp_path / "gaps.png")
    found = dict(zip(titles(figures[0]), map(curves, figures[0].axes), strict=True))
    assert [math.isnan(value) for value in found["skewness, after"]["a"]] == [True, True, False, False, False]
    assert [math.isnan(value) for value in found["variance, before"]["a"]] == [False, True, False, False, False]


@pytest.mark.parametrize("family", FAMILIES)
def test_models_with_other_sites_are_drawn_by_relative_place(measured, figures, tmp_path, family):
    models = {"one": measured(family=family), "short": dict(list(measured().items())[:3])}
    pictures.draw_profiles(models, tmp_path / "places.png")
    one, short = (line.get_xdata().tolist() for line in figures[0].axes[0].lines)
    assert (one, short) == ([0, 0.25, 0.5, 0.75, 1], [0, 0.5, 1])


def test_names_on_axes():
    assert [short_site(site) for site in SITES] == ["0.input", "0.post", "norm"]
    names = ["transformer.h.11.ln_2", "h.0.ln_1", "ln_f", "base_model.model.model.norm", "my norm, step 0.5"]
    assert [short_site(name) for name in names] == ["11.ln_2", "0.ln_1", "ln_f", "norm", "my norm, step 0.5"]


def lam_hat(**fields):
    """A site with a mean of λ̂ and these fields of its distribution."""
    return {"lam_hat": {"mean": 2.5, "least": 0.0, "most": 5.0, "outside": 0.0, **fields}}


@pytest.mark.parametrize("count", [12, 13, 29, 127])
def test_of_many_sites_every_second_or_later_one_is_named_and_the_last(count, figures, tmp_path):
    sites = {f"layers.{i}.input_layernorm": lam_hat() for i in range(count)}
    assert pictures.draw_lam_hat({"deep": sites}, tmp_path / "deep.png")
    (panel,) = figures[0].axes
    named = panel.get_xticks().tolist()
    assert [label.get_text() for label in panel.get_xticklabels()] == [f"{i}.input" for i in named]
    if count <= NAMED:
        assert named == list(range(count))
    else:
        assert len(named) <= NAMED + 1
        assert (named[0], named[-1]) == (0, count - 1)
        assert all(i % 2 == 0 for i in named)


def test_qq_draws_each_channel_in_units_of_its_line(figures, tmp_path):
    values = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * 7 + 5
    channels = [qq(values[:, i]) for i in range(3)]
    panels = {"a": {SITES[0]: channels, SITES[2]: channels[0]}, "b": {SITES[0]: [], SITES[2]: channels[1]}}
    assert pictures.draw_qq(panels, tmp_path / "qq.png")
    assert is_png(tmp_path / "qq.png")
    axes = figures[0].axes
    assert [len(panel.lines) for panel in axes] == [1 + 3, 1 + 1, 1, 1 + 1]  # with the diagonal
    assert [panel.get_title(loc="left") for panel in axes[:2]] == ["0.input", "norm"]
    assert len({(panel.get_xlim(), panel.get_ylim()) for panel in axes}) == 1
    x, y = axes[0].lines[1].get_data()
    assert abs(x - y).mean() < 0.2
    mean = sum(each["r_squared"] for each in channels) / 3
    assert f"mean R² {mean:.3f}" in [text.get_text() for text in axes[0].texts]
    assert not pictures.draw_qq({"a": {SITES[0]: [], SITES[1]: None}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def robustness(size, scale=1.0):
    zeta = tuple(tuple(scale * (i + k) / 100 if k > i else None for k in range(size)) for i in range(size))
    return NoiseRobustness(0.1, 2, tuple(f"h.{i // 2}.ln_{1 + i % 2}" for i in range(size)), zeta, zeta, 9)


def test_heat_maps_share_one_scale(figures, tmp_path):
    maps = {"small": robustness(4), "large": robustness(12, 2.0), "no value": NoiseRobustness(0.1, 1, (), (), (), 9)}
    assert pictures.draw_zeta(maps, tmp_path / "zeta.png")
    assert is_png(tmp_path / "zeta.png")
    small, large, bar = figures[0].axes
    assert small.images[0].get_clim() == large.images[0].get_clim() == (0.0, pytest.approx(42.0))
    assert [text.get_text() for text in small.texts] == ["1.0", "2.0", "3.0", "3.0", "4.0", "5.0"]
    assert not large.texts
    assert [label.get_text() for label in small.get_xticklabels()] == ["0.ln_2", "1.ln_1", "1.ln_2"]
    assert [label.get_text() for label in small.get_yticklabels()] == ["0.ln_1", "0.ln_2", "1.ln_1"]
    assert bar.get_ylabel() == "ζ at δ = 0.1, % of the values before gain and bias"
    assert not pictures.draw_zeta({"no value": maps["no value"]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_lam_hat_of_every_norm_is_in_one_panel(measured, figures, tmp_path):
    models = {"stock": measured(), "normal": measured("layernormalnorm")}
    sites = models["normal"]
    site = next(iter(sites.values()))
    site["lam_hat"] |= {"outside": 0.1234, "most": 2.3}
    assert pictures.draw_lam_hat(models, tmp_path / "one.png")
    (panel,) = figures[0].axes
    assert curves(panel)["normal"].tolist() == [each["lam_hat"]["mean"] for each in sites.values()]
    assert [text.get_text() for text in panel.texts] == ["12.3 %"]
    bars = [tuple(line.get_ydata()) for line in panel.lines if len(line.get_ydata()) == 2]
    assert (site["lam_hat"]["least"], 2.3) in bars
    most = [bar for bar in bars if bar[0] > site["lam_hat"]["least"] and bar[1] < 2.3]
    assert most, "nine in ten rows"
    ticks = ["0.input", "0.post", "1.input", "1.post", "norm"]
    assert [label.get_text() for label in panel.get_xticklabels()] == ticks
    other = {name: {**each, "lam_hat": {**each["lam_hat"], "least": -40.0}} for name, each in sites.items()}
    assert pictures.draw_lam_hat(models | {"other": other}, tmp_path / "two.png")
    (panel,) = figures[1].axes
    assert panel.get_ylim()[0] > -5
    assert "some longer than shown (triangles)" in panel.get_title(loc="left")
    assert [text.get_text() for text in figures[1].legends[0].texts] == ["normal", "other", "no transformation"]
    assert not pictures.draw_lam_hat({"stock": models["stock"]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_thick_bars_are_nine_in_ten_rows_of_a_histogram(figures, tmp_path):
    histogram = {"counts": [5, 0, 80, 10, 5], "edges": [0, 1, 2, 3, 4, 5], "below": 0, "above": 0}
    sites = {"known": lam_hat(**histogram), "far below": lam_hat(**histogram | {"below": 95}), "unknown": lam_hat()}
    assert pictures.draw_lam_hat({"model": sites}, tmp_path / "bars.png")
    thick = [line for line in figures[0].axes[0].lines if line.get_linewidth() == 5]
    assert [(line.get_xdata()[0], tuple(line.get_ydata())) for line in thick] == [(0, (1, 4))]


def test_how_far_newton_is_from_the_likelihood(figures, tmp_path):
    draw = random.Random(0)
    likelihood = [draw.gauss(1, 0.2) for _ in range(100)]
    newton = [value + draw.gauss(0, 0.01) for value in likelihood]
    known = {"newton": newton, "likelihood": likelihood, "rows": 100, "correlation": 0.987654}
    far = {**known, "newton": [-40.0, *newton[1:]], "correlation": None}
    empty = {"newton": None, "likelihood": None, "rows": 0, "correlation": None}
    found = {"a": {"0": known, "1": known, "2": empty}, "b": {"0": far}, "c": {"0": empty}}
    assert pictures.draw_likelihood(found, tmp_path / "likelihood.png")
    assert is_png(tmp_path / "likelihood.png")
    assert titles(figures[0])[:2] == [
        "a: 200 rows; correlation at least 0.9876 at every norm",
        "b: 100 rows; 1 off the scale (×)",
    ]
    assert figures[0].axes[0].get_ylim()[0] > -1
    y = figures[0].axes[0].lines[1].get_ydata()
    assert list(y) == pytest.approx([a - b for a, b in zip(newton, likelihood, strict=True)])
    assert not pictures.draw_likelihood({"c": {"0": empty}}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_variance_over_decades_has_plain_numbers_at_its_ticks(measured, figures, tmp_path):
    sites = measured()
    for i, site in enumerate(sites.values()):
        site["before"]["variance"] = 10.0 ** (2 * i - 3)
        site["before"]["excess_kurtosis"] = -(7.0**i)
    pictures.draw_profiles({"a": sites}, tmp_path / "profiles.png")
    found = dict(zip(titles(figures[0]), figures[0].axes, strict=True))
    labels = tick_labels(found["variance, before"].yaxis)
    assert {"0.01", "1", "100", "10⁴"} <= set(labels)
    assert {"0", "−1", "−10", "−1000"} & set(tick_labels(found["excess kurtosis, before"].yaxis))


def points(steps=(0, 10, 20), estimators=("renyi", "ksg"), sites=SITES):
    def estimate(value):
        return Estimate(value, (value - 0.1, value + 0.1), 0.0, 300)

    return [
        PlanePoint(step, site, name, estimate(1 + i), estimate(i + (step or 0) / 10), estimate(i / 10), 0.5)
        for step in steps
        for i, site in enumerate(sites)
        for name in estimators
    ]


def nothing(found):
    return [replace(each, input=NOTHING, output=NOTHING, ib=NOTHING) for each in found]


def test_the_plane_has_a_panel_for_each_model_and_estimator(figures, tmp_path):
    models = {"a": points(), "b": points(estimators=["renyi"]), "c": nothing(points())}
    assert plane_pictures.draw_plane(models, tmp_path / "plane.png")
    assert is_png(tmp_path / "plane.png")
    *panels, _ = figures[0].axes
    assert titles(figures[0])[:-1] == ["Rényi, a", "Rényi, b", "KSG, a"]
    assert panels[0].get_ylim() == panels[1].get_ylim()
    # Of each site its way, its end and the end's two intervals.
    assert [len(axes.lines) for axes in panels] == [3 * 4] * 3
    assert panels[0].lines[0].get_xydata().tolist() == [[1, 0], [1, 1], [1, 2]]
    assert plane_pictures.draw_plane({"a": points(steps=[None])}, tmp_path / "one.png")
    assert titles(figures[1])[:-1] == ["Rényi, a", "KSG, a"]
    assert not plane_pictures.draw_plane({"c": models["c"], "d": []}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_nothing_is_cut_off_when_panels_share_their_limits(figures, tmp_path):
    models = {"a": points(steps=[0, 10]), "b": points(steps=[0, 90])}
    plane_pictures.draw_plane(models, tmp_path / "plane.png")
    for axes in figures[0].axes[:2]:
        for line in axes.lines:
            assert axes.get_ylim()[0] <= min(line.get_ydata())
            assert max(line.get_ydata()) <= axes.get_ylim()[1]


def test_ib_values_of_the_last_step_over_depth(figures, tmp_path):
    some = points()
    some[-6] = nothing(some[-6:])[0]  # the first site's Rényi value at the last step
    assert plane_pictures.draw_ib({"a": some, "b": points(steps=[None]), "c": nothing(points())}, tmp_path / "ib.png")
    assert is_png(tmp_path / "ib.png")
    renyi, ksg = figures[0].axes
    assert titles(figures[0]) == ["Rényi, β = 0.5", "KSG, β = 0.5"]
    assert curves(renyi)["a"].tolist() == pytest.approx([math.nan, 0.1, 0.2], nan_ok=True)
    assert curves(ksg)["a"].tolist() == pytest.approx([0.0, 0.1, 0.2])
    assert set(curves(ksg)) == {"a", "b"}
    intervals = [tuple(line.get_ydata()) for line in renyi.lines if line.get_label().startswith("_")]
    assert len(intervals) == 2 + 3
    assert intervals[0] == pytest.approx((0.0, 0.2))
    assert not plane_pictures.draw_ib({"c": nothing(points())}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_same_numbers_give_the_same_bytes(measured, tmp_path):
    models = {"a": measured("ibnorm_l")}
    draws = {
        "norm": lambda path: pictures.draw_norm_profiles(models, path),
        "zeta": lambda path: pictures.draw_zeta({"a": robustness(3)}, path),
        "plane": lambda path: plane_pictures.draw_plane({"a": points()}, path),
    }
    for name, draw in draws.items():
        paths = [tmp_path / f"{name}-{i}.png" for i in range(2)]
        assert all(draw(path) for path in paths)
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_importing_the_module_does_not_load_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it is an error
    spec = importlib.util.find_spec(pictures.__name__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
