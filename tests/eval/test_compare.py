"""Paired comparisons: the statistics against known answers, what is refused, and what is written."""

import csv
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from browser import check_layout, needs_chromium
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM

from eval.__main__ import main
from eval.compare import Pairs, bootstrap_interval, compare, holm, p_of_no_difference, pair
from eval.runner import run
from eval.scoring import Stratum
from eval.suites import SUITES, Benchmark, passages
from hf_ibnorm import load_corpus
from hf_ibnorm.report.tables import decimals

COVERAGE = {"items": (300, 1), "clusters": (120, 4), "two tasks": (150, 1)}


def pairs_of(differences, clusters=None, weight=1.0):
    differences = np.asarray(differences, dtype=float)
    clusters = np.arange(len(differences)) if clusters is None else clusters
    return Pairs(np.bincount(clusters, differences), np.bincount(clusters).astype(float), weight)


@pytest.mark.parametrize("kind", COVERAGE)
def test_the_interval_covers_the_truth_as_often_as_it_says(kind):
    # Both models answer items of random difficulty; clusters share theirs. The truth is the mean over all of them.
    clusters, size = COVERAGE[kind]
    generator, covered, draws = np.random.default_rng(3), 0, 1000
    tasks = 2 if kind == "two tasks" else 1
    for _ in range(draws):
        pairs, truth = [], 0.0
        for task in range(tasks):
            difficulty = np.repeat(generator.beta(2, 2, clusters), size)
            gain = 0.06 + 0.04 * task
            first = generator.random(clusters * size) < difficulty * (1 - gain)
            second = generator.random(clusters * size) < difficulty * (1 - gain) + gain
            weight = (0.7, 0.3)[task] if tasks > 1 else 1.0
            pairs.append(pairs_of(second.astype(float) - first, np.repeat(np.arange(clusters), size), weight))
            truth += pairs[-1].weight * gain
        low, high = bootstrap_interval(pairs, generator, 1000)
        covered += low <= truth <= high
    assert 930 <= covered <= 970


def test_the_interval_is_that_of_drawing_items_again_one_by_one():
    generator = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), generator.integers(1, 6, 40))
    values = generator.integers(-1, 2, clusters.size)
    low, high = bootstrap_interval([pairs_of(values, clusters)], generator, 20_000)
    members = [values[clusters == c] for c in range(40)]
    plain = []
    for _ in range(20_000):
        drawn = np.concatenate([members[c] for c in generator.integers(0, 40, 40)])
        plain.append(drawn.mean())
    assert (low, high) == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])), abs=0.012)


def test_without_clusters_the_test_is_mcnemars_exact_one():
    generator = np.random.default_rng(0)
    differences = [1.0] * 17 + [-1.0] * 5 + [0.0] * 100
    assert p_of_no_difference([pairs_of(differences)], generator) == binomtest(17, 22).pvalue
    assert p_of_no_difference([pairs_of([0.0] * 10)], generator) == 1.0


def test_with_clusters_and_with_shares_signs_are_flipped():
    generator = np.random.default_rng(0)
    values = generator.normal(0.4, 1.0, 12)
    exact = np.array([[1 if bits >> k & 1 else -1 for k in range(12)] for bits in range(1 << 12)]) @ values
    expected = (np.abs(exact) >= abs(values.sum()) * (1 - 1e-9)).mean()
    found = p_of_no_difference([pairs_of(values)], generator, 200_000)
    assert found == pytest.approx(expected, rel=0.03)
    # Twelve items of one cluster are one observation: it may have any sign.
    assert p_of_no_difference([pairs_of([1.0] * 12 + [1.0, -1.0], [0] * 12 + [1, 2])], generator, 20_000) > 0.4


def test_the_test_is_right_about_nothing_as_often_as_it_says():
    generator, found = np.random.default_rng(1), []
    for _ in range(400):
        cluster = np.repeat(np.arange(50), 4)
        values = np.repeat(generator.normal(size=50), 4) + generator.normal(size=200)
        found.append(p_of_no_difference([pairs_of(values, cluster)], generator, 500))
    assert 0.02 <= np.mean(np.array(found) < 0.05) <= 0.085


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.9]) == [1.0, None, 1.0]


def test_runs_with_other_items_are_no_pairs():
    def stratum(items):
        values = [1.0] * len(items)
        return Stratum("t", values, values, items, items, 1.0, 0.5, 0)

    assert pair([stratum(["a", "b"])], [stratum(["a", "b"])])[0].sums.tolist() == [0, 0]
    with pytest.raises(ValueError, match="t: the runs have other items"):
        pair([stratum(["a", "b"])], [stratum(["b", "a"])])


def test_of_ratios_only_items_that_differ_count():
    ifeval = next(each for each in SUITES["v2"] if each.name == "leaderboard_ifeval")

    def item(i, right):
        followed = [right] * (2 if i % 2 else 1)
        metrics = {"prompt_level_strict_acc,none": right, "inst_level_strict_acc,none": followed}
        return {"doc_id": i, "doc_hash": str(i), "metrics": metrics}

    def result(right):
        items = [item(i, i < right) for i in range(100)]
        return {"leaderboard_ifeval": {"tasks": {"leaderboard_ifeval": {"items": items, "overlong": 0, "hash": "h"}}}}

    (row,) = compare([ifeval], result(40), result(60))
    assert (row.wins, row.losses) == (20, 0)
    assert row.difference == pytest.approx(0.2)
    assert row.verdict == "better"


def answered(name, items):
    return {name: {"tasks": {name: {"items": items, "overlong": 0, "hash": "h"}}}}


def test_fewer_bits_per_byte_are_better():
    novels = Benchmark("novels", "Novels", ("novels",), "bits_per_byte")

    def result(bits):
        rows = [{"doc_id": i, "doc_hash": "", "metrics": {}, "bytes": 100, "tokens": [50]} for i in range(20)]
        return answered("novels", [{**row, "choices": [-bits * (70 + row["doc_id"])]} for row in rows])

    (row,) = compare([novels], result(2.0), result(1.9))
    assert (row.verdict, row.wins, row.losses) == ("better", 20, 0)
    assert row.difference < 0
    assert compare([novels], result(1.9), result(2.0))[0].verdict == "worse"


def test_a_verdict_needs_the_corrected_p():
    names = ["a", "b", "c"]
    tasks = [Benchmark(name, name, (name,), "exact_match", bounds=0.0) for name in names]

    def result(gained):
        right = [i < 60 or i >= 100 - gained for i in range(100)]
        items = [{"doc_id": i, "doc_hash": "", "metrics": {"exact_match,none": each}} for i, each in enumerate(right)]
        return {name: answered(name, items)[name] for name in names}

    alone, together = compare(tasks[:1], result(0), result(6)), compare(tasks, result(0), result(6))
    assert alone[0].p == together[0].p == pytest.approx(2 * 0.5**6)
    assert alone[0].verdict == "better"
    assert [row.verdict for row in together] == ["not distinguishable"] * 3


def test_of_few_clusters_there_is_no_interval_and_no_test():
    def verdict(clusters):
        def result(right):
            metrics = [{"exact_match,none": i % 3 == 0 or right} for i in range(2 * clusters)]
            items = [{"doc_id": i, "doc_hash": "", "metrics": m, "cluster": str(i // 2)} for i, m in enumerate(metrics)]
            return answered("t", items)

        task = Benchmark("t", "T", ("t",), "exact_match", bounds=0.0)
        (row,) = compare([task], result(False), result(True))
        return row.verdict, row.p is not None, row.interval is not None

    assert verdict(5) == ("not tested", False, False)  # five signs cannot reach 5 %
    assert verdict(6)[1:] == verdict(9)[1:] == (True, False)
    assert verdict(10) == ("better", True, True)


def test_a_novel_is_compared_passage_by_passage(checkpoint, tmp_path, monkeypatch, command):
    text = load_corpus("austen", "test")[0][:30_000]
    monkeypatch.setattr("eval.suites.load_corpus", lambda name, split: [text])
    other = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        other.lm_head.weight.mul_(2)  # of what it does not know it is twice as sure
    other.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, tmp_path / "model")
    for name, model in (("a", checkpoint), ("b", tmp_path / "model")):
        score = run(str(model), "austen_test", str(tmp_path / name))["benchmarks"]["austen_test"]
        assert score["n"] == len(passages(text)) >= 10
        assert score["details"]["bytes"] == len(text.encode())
        assert score["stderr"] > 0
    words = [str(tmp_path / name) for name in ("a", "b", "out")]
    assert command(main, "compare", *words[:2], "--output", words[2])[0] == 0
    (row,) = json.loads((tmp_path / "out" / "comparison.json").read_text())["differences"][words[1]]
    assert (row["verdict"], row["losses"]) == ("worse", row["n"])
    assert 0 < row["interval"][0] < row["difference"] < row["interval"][1]


def test_a_novel_is_divided_into_whole_paragraphs_and_none_is_lost():
    text = load_corpus("austen", "test")[0]
    found = passages(text)
    assert "".join(found) == text
    assert all(300 <= len(each.split()) <= 800 for each in found)
    assert all(each.endswith("\n\n") and each[0] != "\n" for each in found[:-1])


@pytest.fixture(scope="module")
def runs(checkpoint, tmp_path_factory):
    """Directories: a model scored twice (a, b), another model (c), and the first on fewer items (fewer)."""
    from eval import suites
    from hf_ibnorm import load_corpus

    folder = tmp_path_factory.mktemp("runs")
    other = AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std())
    other.save_pretrained(folder / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suites, "load_corpus", lambda name, split: [load_corpus(name, split)[0][:3000]])
        for name, model, limit in (("a", checkpoint, 60), ("b", checkpoint, 60), ("c", folder / "model", 60)):
            run(str(model), "embedded", str(folder / name), limit=limit)
        run(str(checkpoint), "embedded", str(folder / "fewer"), limit=30)
    return folder


def test_a_model_is_not_distinguishable_from_itself(runs, command, tmp_path):
    code, out, err = command(main, "compare", str(runs / "a"), str(runs / "b"), "--output", str(tmp_path / "out"))
    assert (code, err) == (0, "")
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["differences"][str(runs / "b")]
    assert len(rows) == 7
    for row in rows:
        assert row["difference"] == 0
        assert row["wins"] == row["losses"] == 0
        assert row["interval"] is None  # and not "+0.00 to +0.00", as if that were known exactly
        assert row["p"] in (1.0, None)
        tested = "not tested" if row["p"] is None else "not distinguishable"
        assert row["verdict"] in (tested, "both at chance")
    assert rows[0]["verdict"] == "not tested"  # of one passage of the novel
    assert "not tested: austen_test" in out
    assert "SMOKE" in out


def test_a_comparison_is_written_as_data_tables_a_plot_and_one_page(runs, command, tmp_path):
    out = tmp_path / "out"
    code, printed, _ = command(main, "compare", *(str(runs / name) for name in "acb"), "--output", str(out))
    assert code == 0
    names = {"comparison.json", "comparison.csv", "comparison.md", "comparison.tex", "comparison.html", "forest.png"}
    assert {path.name for path in out.iterdir()} == names
    page = (out / "comparison.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "<script" not in page
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("data:image/png;base64,") == 1
    assert "SMOKE" in page
    rows = list(csv.DictReader((out / "comparison.csv").open()))
    assert len(rows) == 14
    for row in rows:
        low, high = (float(end) for end in re.findall(r"-?[\d.e-]+", row["interval"]) or (0, 0))
        digits = max(decimals((high - low) / 2 / 1.96) - 2, 0)
        assert f"<td>{100 * float(row['difference']):+.{digits}f}</td>" in page
        assert row["verdict"] in printed
    heads = re.findall("<th(?: [^>]*)?>(.*?)</th>", page)
    assert heads[:3] == ["benchmark", "verdict", "run"]
    kept = json.loads((out / "comparison.json").read_text())["differences"]
    for row in kept[str(runs / "c")]:
        scores = [json.loads((runs / name / "scores.json").read_text())["benchmarks"] for name in "ac"]
        assert row["first"] == scores[0][row["benchmark"]]["raw"]
        assert row["difference"] == pytest.approx(scores[1][row["benchmark"]]["raw"] - row["first"])
        if row["interval"]:
            assert row["interval"][0] <= row["difference"] <= row["interval"][1]


@needs_chromium
def test_no_table_of_a_comparison_is_wider_than_its_page(runs, command, tmp_path):
    out = tmp_path / "out"
    assert command(main, "compare", *(str(runs / name) for name in "acb"), "--output", str(out))[0] == 0
    check_layout(out / "comparison.html", tmp_path)


def test_a_run_of_a_version_that_knew_fewer_settings_is_compared(runs, tmp_path, command):
    shutil.copytree(runs / "b", tmp_path / "before")
    path = tmp_path / "before" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["identity"]["prompting"]["shots"]
    path.write_text(json.dumps(manifest))
    words = [str(runs / "a"), str(tmp_path / "before"), "--output", str(tmp_path / "out")]
    code, _, err = command(main, "compare", *words)
    assert (code, err) == (0, "")


def edited(runs, tmp_path, change):
    """A copy of a run with one result file changed."""
    shutil.copytree(runs / "b", tmp_path / "edited")
    path = tmp_path / "edited" / "results" / "sva_linzen.json"
    content = json.loads(path.read_text())
    change(content["tasks"]["sva_linzen"])
    path.write_text(json.dumps(content))
    return tmp_path / "edited"


REFUSED = {
    "hash": (lambda task: task.update(hash="0" * 64), "sva_linzen has another hash: 000000000000 in"),
    "shots": (lambda task: task.update(shots=3), "sva_linzen has another shots: 3 in"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_questions_are_not_compared(runs, tmp_path, command, name):
    change, message = REFUSED[name]
    other = edited(runs, tmp_path, change)
    code, out, err = command(main, "compare", str(runs / "a"), str(other), "--output", str(tmp_path / "out"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "out").exists()


def test_other_limits_are_not_compared(runs, tmp_path, command):
    code, _, err = command(main, "compare", str(runs / "a"), str(runs / "fewer"), "--output", str(tmp_path / "out"))
    assert code == 2
    assert "fewer was run with prompting limit=30" in err
    code, _, err = command(main, "compare", str(runs / "a"), "--output", str(tmp_path / "out"))
    assert (code, err) == (2, "error: compare: name two runs or more\n")
    code, _, err = command(main, "compare", str(runs / "a"), str(tmp_path), "--output", str(tmp_path / "out"))
    assert code == 2
    assert "manifest.json cannot be read" in err


def with_answers(runs, tmp_path, name, right):
    """A copy of a run whose model answered the items of one task right as `right` says."""
    target = tmp_path / name
    shutil.copytree(runs / "a", target)
    path = target / "results" / "sva_linzen.json"
    content = json.loads(path.read_text())
    for item, good in zip(content["tasks"]["sva_linzen"]["items"], right, strict=True):
        item["choices"] = [-1.0 if (i == item["gold"]) == good else -2.0 for i in range(2)]
        item["metrics"] = {"acc,none": float(good)}
    path.write_text(json.dumps(content))
    return target


VERDICTS = {
    "better": ([i % 10 < 5 for i in range(60)], [i % 10 < 9 for i in range(60)]),
    "worse": ([i % 10 < 9 for i in range(60)], [i % 10 < 5 for i in range(60)]),
    "not distinguishable": ([i % 10 < 8 for i in range(60)], [i % 10 < 8 or i == 8 for i in range(60)]),
    "both at chance": ([i % 2 == 0 for i in range(60)], [i % 2 == 1 for i in range(60)]),
}


@pytest.mark.parametrize("verdict", VERDICTS)
def test_verdicts(runs, tmp_path, command, verdict):
    first, second = (with_answers(runs, tmp_path, "xy"[i], VERDICTS[verdict][i]) for i in range(2))
    code, out, _ = command(main, "compare", str(first), str(second), "--output", str(tmp_path / "out"))
    assert code == 0
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["differences"][str(second)]
    row = next(row for row in rows if row["benchmark"] == "sva_linzen")
    assert row["verdict"] == verdict, row
    assert f"{verdict}: " in out
    assert row["difference"] == pytest.approx(np.mean(VERDICTS[verdict][1]) - np.mean(VERDICTS[verdict][0]))
    assert math.isfinite(row["p"])
    assert row["adjusted"] >= row["p"]
