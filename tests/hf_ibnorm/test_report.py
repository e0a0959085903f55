"""The report on finished runs: what the table says, and that it does not hide an unfair comparison."""

import json
import re

import pytest
import yaml

from hf_ibnorm.report.__main__ import main
from hf_ibnorm.report.document import Document
from hf_ibnorm.report.runs import Run, comparison, fairness
from hf_ibnorm.report.tables import Table, decimals, score_cell


def write_run(path, norm="rmsnorm", lam=None, init="a" * 64, batches=("x", "y"), seed=0, bits=2.0, smoke=False):
    (path / "final").mkdir(parents=True)
    kwargs = {} if lam is None else {"lam": lam}
    (path / "config.yaml").write_text(
        yaml.safe_dump({"seed": seed, "model": {"norm_type": norm, "norm_kwargs": kwargs}})
    )
    environment = {"init_sha": init, "parameters": 1234567, "device": "cpu", "cpu_count": 2}
    environment |= {"versions": {"torch": "2"}, "date": "2026-01-01T00:00:00"}
    (path / "environment.json").write_text(json.dumps(environment))
    rows = [
        {
            "step": i,
            "loss": 5.0 / i,
            "tokens": 100 * i,
            "tokens_per_second": 50.0,
            "batch_sha": sha,
            "eval_loss": 4.0 / i,
        }
        for i, sha in enumerate(batches, 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    empty = {"stderr": None, "chance": None, "normalized": None, "n": None}
    scores = {
        "austen_test": {
            **empty,
            "raw": bits,
            "details": {"metric": "bits_per_byte", "at_chance": False},
        },
        "sva_simple": {
            **empty,
            **{"raw": 0.5, "stderr": 0.02, "chance": 0.5, "details": {"metric": "acc", "at_chance": True}},
        },
    }
    (path / "scores").mkdir()
    (path / "scores" / "scores.json").write_text(json.dumps({"smoke": smoke, "benchmarks": scores}))
    return path


def test_table_is_led_by_test_bits_per_byte_and_marks_chance(tmp_path):
    runs = [Run.read(write_run(tmp_path / "a")), Run.read(write_run(tmp_path / "b", "ibnorm_t", 2.0, bits=1.9))]
    table = comparison(runs)
    assert table.columns == ["", "rmsnorm", "ibnorm_t λ=2"]
    assert table.rows == [
        ["austen_test, bits per byte (lower is better)", "2.000", "1.900"],
        ["parameters", "1,234,567", "1,234,567"],
        ["tokens trained on", "200", "200"],
        ["seconds per step (fastest tenth)", "2.000", "2.000"],
        ["sva_simple, accuracy", "0.500 ± 0.020 (at chance)", "0.500 ± 0.020 (at chance)"],
        ["validation loss, nats per token", "2.000", "2.000"],
    ]


@pytest.mark.parametrize("options", [{"lam": None}, {}])
def test_a_norm_without_its_lam_is_named_alone(tmp_path, options):
    path = write_run(tmp_path / "a", "ibnorm_t")
    (path / "config.yaml").write_text(
        yaml.safe_dump({"seed": 0, "model": {"norm_type": "ibnorm_t", "norm_kwargs": options}})
    )
    assert comparison([Run.read(path)]).columns == ["", "ibnorm_t"]


def test_a_fair_comparison_prints_the_hash_of_its_start(tmp_path):
    lines = fairness([Run.read(write_run(tmp_path / "a")), Run.read(write_run(tmp_path / "b"))])
    assert lines[0] == "Same initial values of every shared parameter: sha256 aaaaaaaaaaaaaaaa."
    assert lines[1] == "Same data in the same order: all 2 batches have equal hashes."
    assert lines[2].startswith("One seed (0) of a small model decides nothing")


def test_other_weights_or_batches_are_warned_of(tmp_path):
    first = Run.read(write_run(tmp_path / "a"))
    assert "WARNING" in fairness([first, Run.read(write_run(tmp_path / "b", init="b" * 64))])[0]
    assert "WARNING" in fairness([first, Run.read(write_run(tmp_path / "c", batches=("y", "x")))])[1]


def test_other_settings_are_warned_of_and_runs_of_one_norm_are_told_apart(tmp_path):
    write_run(tmp_path / "a")
    other = write_run(tmp_path / "b")
    config = yaml.safe_load((other / "config.yaml").read_text()) | {"learning_rate": 1.0}
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    runs = [Run.read(tmp_path / "a"), Run.read(other)]
    assert "WARNING: besides the norm the runs differ in learning_rate." in fairness(runs)
    assert comparison(runs).columns == ["", "rmsnorm (a)", "rmsnorm (b)"]


@pytest.mark.parametrize(("noted", "warned"), [((), True), (("b",), False), (("a", "b"), False)])
def test_settings_that_a_run_notes_as_harmless_spoil_no_comparison(tmp_path, noted, warned):
    for name, steps in (("a", 10), ("b", 20)):
        run = write_run(tmp_path / name)
        config = yaml.safe_load((run / "config.yaml").read_text()) | {"checkpoint_every": steps}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        if name in noted:  # a run of an older release has no such note
            environment = json.loads((run / "environment.json").read_text())
            (run / "environment.json").write_text(json.dumps(environment | {"harmless_settings": ["checkpoint_every"]}))
    lines = "\n".join(fairness([Run.read(tmp_path / name) for name in ("a", "b")]))
    assert ("the runs differ in checkpoint_every." in lines) == warned


def test_scores_that_are_partial_or_missing_are_warned_of(tmp_path):
    partial, unscored = write_run(tmp_path / "a", smoke=True), write_run(tmp_path / "b", seed=1)
    (unscored / "scores" / "scores.json").unlink()
    lines = "\n".join(fairness([Run.read(partial), Run.read(unscored)]))
    assert "WARNING: a was scored on part of the items only: SMOKE" in lines
    assert "WARNING: b has not been scored" in lines
    assert "differ in seed." in lines


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 1', "metrics.jsonl, line 1, cannot be read: Expecting"),
        ("metrics.jsonl", "", "metrics.jsonl does not end with a validated step"),
        ("environment.json", "{}", "environment.json has no init_sha"),
        ("metrics.jsonl", '{"step": "1"}', "metrics.jsonl, line 1: step: got '1', must be a whole number"),
        ("environment.json", "[1]", r"environment.json: got \[1\], must be a mapping"),
        ("config.yaml", "seed: 0", "config.yaml has no model"),
        ("config.yaml", "seed: 0\nseed: 1", "seed stands there twice, the second time in line 2"),
        (
            "scores/scores.json",
            '{"smoke": false, "benchmarks": {"boolq": {"raw": "0.5"}}}',
            "boolq: raw: got '0.5', must be",
        ),
        ("config.yaml", "{seed: 0, model: null}", "config.yaml: model: got None, must be a mapping"),
    ],
)
def test_a_damaged_run_is_an_error_that_names_the_file(tmp_path, name, content, message):
    (write_run(tmp_path / "a") / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Run.read(tmp_path / "a")


def test_nothing_is_cut_off_on_a_narrow_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    runs = [Run.read(write_run(tmp_path / "a")), Run.read(write_run(tmp_path / "b", "ibnorm_t", 2.0))]
    comparison(runs).print()
    printed = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).split())
    assert "…" not in printed
    assert printed.count("(at chance)") == 2
    assert printed.count("better)") == 1


def test_command_writes_report_and_picture(command, tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", "ibnorm_t", 2.0)
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    code, out, err = command(main, *runs, "--output", str(tmp_path))
    assert (code, err) == (0, "")
    assert "Same initial values" in out
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "| parameters | 1,234,567 | 1,234,567 |" in (tmp_path / "report.md").read_text()
    code, out, err = command(main, *runs, "--output", str(tmp_path / "a" / "config.yaml"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    code, out, err = command(main, *runs, "--output", str(tmp_path / "new" / "folder"))
    assert (code, err) == (0, "")
    assert (tmp_path / "new" / "folder" / "report.md").exists()


def test_an_unfinished_run_is_refused(tmp_path):
    (write_run(tmp_path / "a") / "final").rmdir()
    with pytest.raises(ValueError, match="not a finished run directory \\(it has no final\\)"):
        Run.read(tmp_path / "a")


def test_markdown_escapes_pipes():
    assert Table(["a", "b"], [["x|y", "1"]]).markdown() == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |\n"


@pytest.mark.parametrize(
    ("raw", "stderr", "chance", "at_chance", "cell"),
    [
        (0.5, 0.02, 0.5, True, "0.500 ± 0.020 (at chance)"),
        (0.4, 0.02, 0.5, False, "0.400 ± 0.020 (below chance)"),
        (0.6, 0.02, 0.5, False, "0.600 ± 0.020"),
        (1.23456, None, None, False, "1.235"),
    ],
)
def test_a_score_says_when_it_is_no_better_than_guessing(raw, stderr, chance, at_chance, cell):
    score = {"raw": raw, "stderr": stderr, "chance": chance, "details": {"at_chance": at_chance}}
    assert score_cell(score) == cell


@pytest.mark.parametrize(
    ("error", "digits"),
    [(0.0435, 3), (0.0099, 4), (0.00996, 3), (0.2, 2), (1.5, 1), (9.99, 0), (38.0, 0), (1e-9, 4), (0.0, 4), (None, 4)],
)
def test_two_digits_of_the_error_are_shown(error, digits):
    assert decimals(error) == digits


def test_columns_of_words_are_aligned_to_the_left():
    table = Table(["norm", "verdict", "loss"], [["a", "worse", "1"]], text=2)
    assert table.markdown().splitlines()[1] == "| --- | --- | ---: |"
    assert r"\begin{tabular}{llr}" in table.latex("")
    document = Document("", {"worse": "bad"})
    document.table(table)
    assert '<tr><td class="text">a</td><td class="text bad">worse</td><td>1</td></tr>' in document.html()
