"""`hf-ibnorm analyze`: what it writes is what the library measures, and what it cannot measure it says."""

import csv
import json
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from browser import check_layout, needs_chromium
from helpers import shake
from tokenizers.processors import TemplateProcessing
from training import run, small_corpus
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_ibnorm import apply_norm
from hf_ibnorm.analysis import analyze, lambda_against_likelihood, measure_normality, noise_robustness, watch
from hf_ibnorm.analysis.model import PARTS, Measuring, analyze_model
from hf_ibnorm.analysis.show.describe import describe, draw_pictures, qq_grid
from hf_ibnorm.base.errors import UserError
from hf_ibnorm.cli import main
from hf_ibnorm.data.text import draw_text
from train_lm.tokenizer import train_tokenizer, wrap_tokenizer

CSV_FILES = {"models", "sites", "normality", "channels", "pairs", "qq", "noise", "plane"}
PICTURES = {"profiles", "qq", "zeta", "plane", "ib"}
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
QUICK = ["--tokens", "2200", "--rows", "60", "--draws", "2", "--noise_tokens", "64", "--samples", "250"]
SITES = ["layers.0.input_layernorm", "layers.1.input_layernorm", "norm"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny stock Llama with a tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "stock"
    shake(LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=64))).save_pretrained(folder)
    wrap_tokenizer(train_tokenizer(["some text to learn from " * 9], 300), 64).save_pretrained(folder)
    return folder


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def number(text):
    return None if text == "" else float(text)


@pytest.fixture(scope="module")
def normal(folder):
    """The same model with LayerNormalNorm."""
    target = folder.with_name("layernormalnorm")
    shutil.copytree(folder, target)
    apply_norm(AutoModelForCausalLM.from_pretrained(folder), "layernormalnorm", alpha=0.5).save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def report(folder, normal, tmp_path_factory):
    """Of both."""
    measuring = Measuring(rows=60, draws=2, noise_tokens=64, samples=250)
    output = tmp_path_factory.mktemp("reports") / "report"
    analyze({"stock": folder, "normal": normal}, output, tokens=2200, measuring=measuring)
    return output


def test_the_numbers_are_those_of_the_library(report, normal):
    model = AutoModelForCausalLM.from_pretrained(normal).eval()
    text = draw_text("data", "sotu", "test", AutoTokenizer.from_pretrained(normal), 2200, 64)
    with watch(model.model, sample=60) as statistics, torch.no_grad():
        for ids in text.ids.split(2048 // 64):
            model(input_ids=ids)
    found = statistics.result()
    written = {row["site"]: row for row in rows(report / "sites.csv") if row["model"] == "normal"}
    assert list(written) == list(found)
    for site, cells in found.items():
        row = written[site]
        assert int(row["rows"]) == text.ids.numel() == 34 * 64
        for place in ("before", "after"):
            for cell in ("mean", "variance", "excess_kurtosis", "hoyer", "effective_rank"):
                assert number(row[f"{place}_{cell}"]) == pytest.approx(cells[place][cell], rel=1e-6, abs=1e-9)
            assert number(row[f"{place}_quantile_0.5"]) == cells[place]["quantiles"]["0.5"]
        assert number(row["lam_hat_outside"]) == pytest.approx(cells["lam_hat"]["outside"])
        assert number(row["p_std_least"]) == pytest.approx(cells["p_std"]["least"], rel=1e-6)
        assert row["contraction"] == ""
        assert "contraction: only an IBNorm has one" in row["reasons"]
    counts = [int(row["rows"]) for row in rows(report / "lam_hat.csv") if row["site"] == "norm"]
    assert sum(counts) == text.ids.numel()
    before = statistics.sites["norm"].before.sample.rows()
    expected = lambda_against_likelihood(before, alpha=0.5, eps=1e-5)
    pairs = [(number(row["newton"]), number(row["likelihood"])) for row in rows(report / "likelihood_rows.csv")]
    assert number(rows(report / "likelihood.csv")[-1]["correlation"]) == pytest.approx(expected["correlation"])
    assert pairs[-len(expected["newton"]) :] == list(zip(expected["newton"], expected["likelihood"], strict=True))
    normality = measure_normality(before)
    row = rows(report / "normality.csv")[-2]
    assert (row["model"], row["site"], row["place"]) == ("normal", "norm", "before")
    assert number(row["r_squared_mean"]) == pytest.approx(normality["r_squared"]["mean"])
    assert number(row["henze_zirkler_rejected"]) == pytest.approx(normality["henze_zirkler"]["rejected"])
    train = draw_text("data", "sotu", "train", AutoTokenizer.from_pretrained(normal), 2200, 64).ids
    noise = noise_robustness(model, text.ids[[0]], draws=2, scale_ids=train)
    found = {
        (row["noise_at"], row["measured_at"]): row for row in rows(report / "noise.csv") if row["model"] == "normal"
    }
    assert len(found) == 10
    assert number(found[noise.sites[0], "norm"]["zeta"]) == pytest.approx(noise.zeta[0][-1], rel=1e-6)


def test_everything_is_there_and_the_page_needs_nothing_else(report):
    names = {path.name for path in report.iterdir()}
    files = {f"{name}.csv" for name in CSV_FILES | {"lam_hat", "likelihood", "likelihood_rows"}}
    pictures = {f"{name}.png" for name in PICTURES | {"lam_hat", "likelihood"}}
    assert names - {"norms.png"} == files | pictures | {"analysis.json", "report.html"}
    page = (report / "report.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == len([name for name in names if name.endswith(".png")])
    assert not re.search(r"<script|https?://|src=\"(?!data:)", page)
    for text in ("stock", "normal", "layers.1.post_attention_layernorm", "34", "chance"):
        assert text in page
    record = json.loads((report / "analysis.json").read_text(encoding="utf-8"))
    assert record["options"]["delta"] == 0.5
    assert set(record["models"]) == {"stock", "normal"}
    assert record["models"]["stock"]["tokens_sha"] == record["models"]["normal"]["tokens_sha"]


@needs_chromium
def test_no_table_of_the_page_is_wider_than_the_page(report, tmp_path):
    check_layout(report / "report.html", tmp_path, verdict=False)


def test_what_is_drawn_of_channels_is_what_comes_out(report):
    record = json.loads((report / "analysis.json").read_text(encoding="utf-8"))
    panels, normality = qq_grid(record["models"]), record["models"]["normal"]["normality"]
    assert list(panels) == ["stock", "normal"]
    assert list(panels["normal"]) == ["first norm", "middle norm", "last norm"]
    assert panels["normal"]["last norm"] == normality["norm"]["after"]["qq"]
    assert panels["normal"]["first norm"] == normality["layers.0.input_layernorm"]["after"]["qq"]


def test_a_record_read_back_gives_the_same_page(report, tmp_path):
    record = json.loads((report / "analysis.json").read_text(encoding="utf-8"))
    again = describe(record, draw_pictures(record, tmp_path), tmp_path).html()
    assert again == (report / "report.html").read_text(encoding="utf-8")


def test_what_cannot_be_measured_is_empty_and_says_why(report):
    ksg = [row for row in rows(report / "plane.csv") if row["estimator"] == "ksg"]
    assert len(ksg) == 10
    assert {row["reason"] for row in ksg} == {"250 samples, at least 2000 are needed"}
    assert {row["i_xt"] for row in ksg} == {""}
    assert all(row["i_xt"] for row in rows(report / "plane.csv") if row["estimator"] == "renyi")
    assert "250 samples, at least 2000 are needed" in (report / "report.html").read_text(encoding="utf-8")


def test_the_same_command_gives_the_same_files(folder, tmp_path):
    options = {
        "data": "austen",
        "tokens": 300,
        "measuring": Measuring(sites=tuple(SITES), skip=("information",), rows=30, draws=1),
    }
    for name in ("one", "two"):
        analyze([folder], tmp_path / name, **options)
    for path in sorted((tmp_path / "one").iterdir()):
        if path.name not in ("analysis.json", "report.html"):  # which have the date
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert [row["site"] for row in rows(tmp_path / "one" / "sites.csv")] == SITES
    assert {row["noise_at"] for row in rows(tmp_path / "one" / "noise.csv")} == set(SITES[:2])


def test_parts_can_be_left_out(folder, command, tmp_path):
    words = ["--skip", "normality", "noise", "information", "--tokens", "300", "--output", str(tmp_path / "out")]
    code, out, err = command(main, "analyze", "--model", str(folder), *words)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "stock: 256 tokens of the test split of sotu"
    assert out.splitlines()[1].split() == ["median", "over", "the", "norms", "stock"]
    assert out.splitlines()[2].split() == ["norm", "LlamaRMSNorm"]
    assert out.splitlines()[3].startswith("loss, nats a token")
    assert out.splitlines()[-1] == f"report: {tmp_path / 'out' / 'report.html'}"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("analysis.json", "report.html", "sites.csv", "models.csv", "profiles.png"),
    }
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # of the command only
    assert "left out" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_token_beyond_the_embedding_is_no_matter_where_no_text_becomes_it(folder, command, tmp_path):
    """A `<pad>` that was added; a text that spells it is read as text or refused, but ends in no error of torch's."""
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{i}>" for i in range(100)]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id >= 300
    tokenizer.save_pretrained(model)
    (tmp_path / "spelt.txt").write_text("some text to <pad> learn from " * 200, encoding="utf-8")
    words = ["--skip", "normality", "noise", "information", "--tokens", "300", "--output"]
    for name in (folder, model):
        assert command(main, "analyze", "--model", f"m={name}", *words, str(tmp_path / f"{name.name}.out"))[0] == 0
    stock, padded = ((tmp_path / f"{name.name}.out" / "sites.csv").read_bytes() for name in (folder, model))
    assert stock == padded
    data = ["--data", str(tmp_path / "spelt.txt")]
    code, _, err = command(main, "analyze", "--model", str(model), *data, *words, str(tmp_path / "spelt"))
    assert code == 0 or (code == 2 and "which has the token '<pad>'" in err)


@pytest.mark.usefixtures(small_corpus.__name__)
def test_of_a_run_the_checkpoints_are_looked_at_too(command, tmp_path):
    flags = ["--model.norm_type", "ibnorm_l", "--max_steps", "4", "--checkpoint_every", "1", "--keep_every", "1"]
    run(tmp_path / "run", *flags)
    words = ["--tokens", "600", "--rows", "40", "--samples", "200", "--skip", "noise", "--sites", "norm"]
    output = tmp_path / "out"
    code, _, err = command(
        main, "analyze", "--model", str(tmp_path / "run"), "--checkpoints", "3", "--output", str(output), *words
    )
    assert (code, err) == (0, "")
    plane = [row for row in rows(output / "plane.csv") if row["estimator"] == "renyi"]
    assert [(row["model"], row["step"]) for row in plane] == [("run", "0"), ("run", "3"), ("run", "4")]
    assert {row["step"] for row in rows(output / "normality.csv")} == {"0", "4"}
    assert {row["step"] for row in rows(output / "qq.csv")} == {"0", "4"}
    record = json.loads((output / "analysis.json").read_text(encoding="utf-8"))["models"]["run"]
    assert record["start"]["loss"] > record["loss"]
    assert record["sites"]["norm"]["contraction"] < 1


@pytest.mark.usefixtures(small_corpus.__name__)
def test_of_a_run_that_is_not_finished_the_newest_checkpoint_is_looked_at(tmp_path):
    run(tmp_path / "run", "--max_steps", "3", "--checkpoint_every", "1")
    shutil.rmtree(tmp_path / "run" / "final")
    measuring = Measuring(skip=("noise", "information"), sites=("norm",), rows=30)
    record = analyze([tmp_path / "run"], tmp_path / "out", tokens=512, measuring=measuring)
    found = record["models"]["run"]
    assert (found["step"], Path(found["folder"]).parts[-2:]) == (3, ("step-3", "model"))
    assert found["start"]["loss"] > found["loss"]


def other(folder, model, target):
    """A model of another family with the tokenizer of `folder`."""
    shutil.copytree(folder, target)
    shake(model).save_pretrained(target)
    return target


def test_other_families_are_looked_at_too(folder, tmp_path):
    config = Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16, max_position_embeddings=64)
    qwen = other(folder, Qwen3ForCausalLM(config), tmp_path / "qwen")
    measuring = Measuring(rows=40, draws=1, noise_tokens=64, samples=250)
    record = analyze({"stock": folder, "qwen": qwen}, tmp_path / "out", tokens=300, measuring=measuring)
    found = record["models"]["qwen"]
    assert found["sites"]["layers.0.self_attn.q_norm"]["rows"] == 2 * 256
    assert found["sites"]["layers.0.self_attn.q_norm"]["width"] == 16
    assert {point["site"] for point in found["plane"]} == set(found["sites"])
    assert found["norm"] == "Qwen3RMSNorm"
    assert found["unknown"] == []


def test_a_site_has_to_match_in_one_of_the_models(folder, source, tmp_path):
    gpt2 = source("gpt2", n_positions=64)
    measuring = Measuring(skip=PARTS, sites=("layers.1.*", "h.0.*"))
    record = analyze([folder, gpt2], tmp_path / "out", tokens=256, measuring=measuring)
    sites = [list(model["sites"]) for model in record["models"].values()]
    assert sites == [["layers.1.input_layernorm", "layers.1.post_attention_layernorm"], ["h.0.ln_1", "h.0.ln_2"]]
    with pytest.raises(UserError, match=r"^sites: got h\.0\.\*, which matches no norm of stock"):
        analyze([folder, gpt2], tmp_path / "two", tokens=256, measuring=replace(measuring, sites=("h.0.*",)))


def test_rows_begin_with_the_token_that_texts_begin_with(folder, tmp_path):
    target = tmp_path / "begins"
    shutil.copytree(folder, target)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = tokenizer.bos_token or tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
    )
    tokenizer.bos_token = bos
    tokenizer.save_pretrained(target)
    assert AutoTokenizer.from_pretrained(target)("a").input_ids[0] == tokenizer.bos_token_id
    measuring = Measuring(skip=PARTS)
    record = analyze([folder, target], tmp_path / "out", tokens=256, measuring=measuring)
    losses = {name: model["loss"] for name, model in record["models"].items()}
    text = draw_text("data", "sotu", "test", tokenizer, 256, 64).ids
    text[:, 0] = tokenizer.bos_token_id
    assert losses["begins"] == analyze_model(AutoModelForCausalLM.from_pretrained(target), text, measuring)["loss"]
    assert losses["begins"] != losses["stock"]


def test_names_may_have_signs_that_pictures_know(folder, command, tmp_path):
    words = ["--model", f"a$b^$={folder}", "--tokens", "256", "--skip", "normality", "information", "--draws", "1"]
    assert command(main, "analyze", *words, "--output", str(tmp_path / "out"))[0] == 0
    assert (tmp_path / "out" / "zeta.png").exists()
    (tmp_path / "lr=0.1").mkdir()
    (tmp_path / "lr=0.1" / "model").symlink_to(folder)
    words = ["--model", str(tmp_path / "lr=0.1"), "--tokens", "256", "--skip", *PARTS]
    assert command(main, "analyze", *words, "--output", str(tmp_path / "two"))[0] == 0


def test_layers_that_share_a_norm(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[1] = model.model.layers[0]
    ids = torch.randint(300, (8, 64), generator=torch.Generator().manual_seed(0))
    found = analyze_model(model, ids, Measuring(skip=("normality",), samples=250, draws=1, noise_tokens=64))
    assert found["noise"] is None
    assert found["reasons"]["noise"].endswith("each a module of its own")
    reasons = {(point["site"], point["ib"]["reason"]) for point in found["plane"] if point["estimator"] == "renyi"}
    assert ("norm", "") in reasons
    assert ("layers.1.input_layernorm", "the norm does not run once for each position") in reasons


def test_a_norm_that_does_not_run_is_empty_and_says_why(source, tmp_path):
    gpt2 = source("gpt2", n_positions=64, add_cross_attention=True)  # whose norm needs an encoder
    measuring = Measuring(rows=40, draws=1, noise_tokens=64, samples=250)
    model = analyze([gpt2], tmp_path / "out", tokens=256, measuring=measuring)["models"][gpt2.name]
    site = "h.0.ln_cross_attn"
    assert model["sites"][site]["reasons"]["before"] == "the norm has not run"
    assert model["normality"][site]["after"]["reasons"]["r_squared"] == "0 rows; needs 20"
    assert model["normality"]["h.0.ln_1"]["after"]["r_squared"] is not None
    assert "the norm has not run" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_noise_beyond_all_numbers_leaves_cells_empty(folder, tmp_path):
    measuring = Measuring(skip=("normality", "information"), delta=1e38, draws=1, noise_tokens=64)
    record = analyze([folder], tmp_path / "out", tokens=256, measuring=measuring)
    assert record["models"]["stock"]["noise"]["zeta"][0][-1] is None


@pytest.mark.parametrize(
    ("ids", "measuring", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), {}, r"ids: got shape \(5,\), must be \(rows, length\)"),
        (torch.zeros(5, 1, dtype=torch.int64), {}, "ids: got shape"),
        (torch.zeros(2, 9, dtype=torch.int64), {"rows": 50.5}, "rows: got 50.5, must be a whole number"),
        (torch.zeros(2, 9, dtype=torch.int64), {"sites": ()}, "sites: got '', which matches none"),
        (torch.zeros(2, 9, dtype=torch.int64), {"skip": "nois"}, "skip: got 'nois', allowed are normality"),
    ],
)
def test_bad_arguments_in_a_notebook(folder, ids, measuring, message):
    with pytest.raises(ValueError, match=message):
        analyze_model(AutoModelForCausalLM.from_pretrained(folder), ids, Measuring(**measuring))


def test_a_model_that_gives_no_numbers_is_refused(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="model: it gives numbers that are not finite"):
        analyze_model(model, torch.zeros(2, 64, dtype=torch.int64), Measuring(skip=PARTS))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "63"], "error: tokens: got 63, must be at least a block of FOLDER: 64"),
        (["--data", "nowhere.txt"], "error: data: got 'nowhere.txt', neither a corpus"),
        (["--data", "short.txt"], "error: data: got 'short.txt', which has 2 tokens; must have at least 256"),
        (["--skip", "nothing"], "error: skip: got 'nothing', allowed are normality, noise, information"),
        (["--sites", "layers.9.*"], "error: sites: got 'layers.9.*', which matches none of layers.0"),
        (["--rows", "0"], "error: rows: got 0, must be a finite number >= 1"),
        (["--delta", "-1"], "error: delta: got -1.0, must be a finite number >= 0"),
        (["--checkpoints", "0"], "error: checkpoints: got 0, must be"),
        (["--seed", "x"], "error: argument --seed: invalid int value: 'x'"),
        (["--model", "_hidden=FOLDER"], "error: model: got the name '_hidden', must not begin with _"),
        (["--model", "no_such"], "error: model: no_such is not a model directory (it has no config.json)"),
        (["--model", "FOLDER", "FOLDER"], "error: model: got FOLDER, FOLDER, must be different ones"),
        (
            ["--model", "a=FOLDER", "a=other"],
            "error: model: got 'a=other', must be NAME=DIR like the others, each name",
        ),
        (["--output", "taken"], "error: output: taken is not empty; name a new directory"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder, command, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("some text", encoding="utf-8")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    words = [word.replace("FOLDER", str(folder)) for word in words]
    asked = {"--model": [str(folder)], "--output": ["out"], "--tokens": ["300"]}
    flags = [word for flag, values in asked.items() if flag not in words for word in (flag, *values)]
    code, out, err = command(main, "analyze", *words, *flags)
    assert (code, out) == (2, "")
    assert err.startswith(message.replace("FOLDER", str(folder)))
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_norm_of_another_family_is_known_by_what_it_computes(folder, command, tmp_path):
    cohere = other(folder, CohereForCausalLM(CohereConfig(**SIZES, max_position_embeddings=64)), tmp_path / "cohere")
    code, _, err = command(
        main, "analyze", "--model", str(folder), str(cohere), "--output", str(tmp_path / "out"), *QUICK
    )
    assert (code, err) == (0, "")
    sites = json.loads((tmp_path / "out/analysis.json").read_text())["models"]["cohere"]["sites"]
    assert {site["norm"] for site in sites.values()} == {"CohereLayerNorm"}


def test_without_the_extra_there_is_one_line(folder, command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pingouin", None)
    code, _, err = command(main, "analyze", "--model", str(folder), "--output", str(tmp_path / "out"))
    assert (code, err) == (2, "error: pingouin not installed: pip install 'hf_ibnorm[analysis]'\n")
