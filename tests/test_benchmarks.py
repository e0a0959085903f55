"""The benchmarks' own peer is what it says it is, and docs/performance.md is what was measured."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from browser import check_layout, needs_chromium
from pictures import tick_labels
from safetensors.torch import load_file
from training import small_corpus

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    """Modules of benchmarks/ can be imported."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield
    for name in ("published", "page", "convert", "watching", "analysis", "insight", "long_text", "studies"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("case", ["gaussian", "heavy_tail", "skewed", "bimodal", "one_outlier", "tiny_scale"])
def test_the_published_form_computes_what_was_published(case, fixtures):
    from published import published_normal_norm

    tensors = load_file(fixtures / "normalnorm_reference.safetensors")
    reference = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"layer.{case}.")}
    x = reference["x"].requires_grad_()
    y = published_normal_norm(x, reference.get("weight"), reference.get("bias"))
    torch.testing.assert_close(y, reference["y"], rtol=1e-8, atol=1e-8)
    (gradient,) = torch.autograd.grad(y, x, reference["grad_y"])
    torch.testing.assert_close(gradient, reference["grad_x"], rtol=1e-6, atol=1e-8)


def test_the_pages_show_the_results_in_the_tree():
    import page

    tables = page.tables()
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in page.PAGES]
    assert [page.filled(text, tables) for text in texts] == texts
    assert all(any(table in text for text in texts) for table in tables.values())


def test_the_page_of_conversions_shows_the_reports_in_the_tree():
    import conversion
    from page import filled

    text = conversion.PAGE.read_text(encoding="utf-8")
    assert filled(text, conversion.tables()) == text
    assert conversion.reports().keys() == set(conversion.CASES)
    assert all(f"results/convert/{case}/report.md" in text for case in conversion.CASES)


def test_the_page_of_diagnostics_shows_the_results_in_the_tree():
    import insight
    from page import filled

    text = insight.PAGE.read_text(encoding="utf-8")
    tables = insight.tables()
    assert filled(text, tables) == text
    assert all(table in text for table in tables.values())
    assert set(insight.facts()["models"]) == {"rmsnorm", "ibnorm_l", "ibnorm_t", "ibnorm_shrink", "layernormalnorm"}


@pytest.mark.slow
def test_an_analysis_is_timed_in_a_process_of_its_own(tmp_path):
    import analysis

    analysis.write_model("ibnorm_l", tmp_path)
    found = analysis.once(tmp_path, 300, "statistics")
    assert found["tokens"] == 256
    assert found["seconds"] > 0
    assert 0 < found["peak"] < 1e9


@pytest.mark.slow
def test_a_text_of_one_line_takes_no_more_memory_for_being_longer():
    import long_text

    rows = {(row["kind"], row["megabytes"]): row for row in long_text.readings([2, 8], threads=2)}
    short, long = (float(rows["txt", size]["peak_mb"]) for size in ("2", "8"))
    assert long < short + 30, "184 bytes a byte would be 1,100 MB more"
    assert float(rows["jsonl", "8"]["peak_mb"]) < float(rows["jsonl", "2"]["peak_mb"]) + 6 * long_text.BYTES_A_BYTE
    assert rows["jsonl", "8"]["tokens"] == pytest.approx(rows["txt", "8"]["tokens"], abs=20)


@pytest.mark.slow
def test_a_conversion_is_measured_beside_copies():
    import convert

    rows = {row["kind"]: row for row in convert.conversions(gigabytes=0.002, shard_megabytes=0.5, repeats=1)}
    assert list(rows) == ["copy", "copy, flushed", "keep", "identity"]
    for init in convert.INITS:
        assert rows[init]["shards"] > 3
        assert 0 < float(rows[init]["peak_mb"]) <= float(rows[init]["bound_mb"])


@pytest.mark.usefixtures(small_corpus.__name__)
def test_watched_steps_are_measured_beside_plain_ones():
    import watching

    (row,) = watching.overheads(rounds=1, pairs=2, recipe="tiny", norms=("ibnorm_l",))
    plain, watched = float(row["plain_seconds"]), float(row["watched_seconds"])
    assert 0 < plain < watched
    assert float(row["overhead_at_50"]) == pytest.approx((watched / plain - 1) / 50, rel=0.05)


def test_the_plot_of_speeds_has_plain_ticks_and_a_look_for_each_curve(figures, tmp_path):
    import page

    page.plot(page.read("fused_norms"), tmp_path / "performance.png")
    (axes,) = figures[0].axes
    assert tick_labels(axes.yaxis) == ["1", "2", "5", "10", "20", "50"]
    assert tick_labels(axes.xaxis) == ["512", "1024", "2048", "4096"]
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.lines}
    assert len(looks) == len(axes.lines) == len(axes.get_legend().texts) + 1  # with the line at 1


def test_the_pictures_of_diagnostics_are_drawn_from_the_tree(figures, tmp_path, monkeypatch):
    import insight

    monkeypatch.setattr(insight, "RESULTS", shutil.copytree(insight.RESULTS, tmp_path / "insight"))
    monkeypatch.setattr(insight, "DRAWN", tmp_path / "insight" / "pictures.json")
    insight.draw()
    drawn = {path.name for path in (tmp_path / "insight").glob("*.png")}
    assert drawn == {path.name for path in (ROOT / "docs/results/insight").glob("*.png")}
    assert len(figures) >= 6
    titles = [axes.get_title(loc="left") for axes in figures[0].axes]
    assert len(titles) == len(set(titles)) == 8


@pytest.mark.parametrize("name", ["quick", "lambda"])
def test_the_pages_of_studies_are_made_from_the_tree(name, figures, tmp_path, monkeypatch):
    import studies

    monkeypatch.setattr(studies, "RESULTS", tmp_path)
    kept = ROOT / "docs/results" / name
    folder = shutil.copytree(kept, tmp_path / name)
    studies.redraw(name)
    for file in ("report.md", "verdicts.csv", "verdicts.tex"):
        assert (folder / file).read_text(encoding="utf-8") == (kept / file).read_text(encoding="utf-8")
    cost = next(each for each in figures if each.axes[0].get_xlabel().startswith("seconds"))
    handles, names = cost.axes[0].get_legend().legend_handles, cost.axes[0].get_legend().texts
    assert len({tuple(each.get_color()[0]) for each in handles}) == len(names) <= 10


@needs_chromium
def test_no_table_of_a_wide_study_is_wider_than_its_page(tmp_path, monkeypatch):
    import studies

    monkeypatch.setattr(studies, "RESULTS", tmp_path)
    monkeypatch.setattr(studies, "draw_pictures", lambda *_: [])
    folder = shutil.copytree(ROOT / "docs/results/lambda", tmp_path / "lambda")
    studies.redraw("lambda")
    check_layout(folder / "report.html", tmp_path)
