"""What a conversion cost: the numbers are those of their definitions, and a report lies beside the checkpoint."""

import csv
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import build, shake
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_ibnorm import convert_checkpoint, norm_sites
from hf_ibnorm.cli import main
from hf_ibnorm.convert.cost import report_conversion
from hf_ibnorm.convert.measure import measure
from hf_ibnorm.data.text import Text, draw_text

QUICK = ["--report_tokens", "300", "--report_scores", "0"]


@pytest.fixture
def folder(source):
    return source("llama", max_position_embeddings=512)


def loaded(path):
    return AutoModelForCausalLM.from_pretrained(path).eval()


def test_bytes_are_those_of_the_text_behind_the_tokens(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Größe, naïve café — ½ λ ≤ 3 🙂 and plain words. " * 40
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    drawn = draw_text("data", str(tmp_path / "text.txt"), "test", tokenizer, 600, 200)
    assert drawn.ids.shape == (3, 200)
    # Each token of this tokenizer stands for bytes, of which a character may have several.
    size = {index: len(word) for word, index in tokenizer.get_vocab().items()}
    first, end = drawn.ids[0].tolist(), drawn.ids.flatten().tolist()
    assert tokenizer.decode(first)[:20] == text[:20]
    told = sum(size[each] for row in drawn.ids.tolist() for each in row[1:])
    assert drawn.bytes == pytest.approx(told, abs=3 * len(drawn.ids) * 3)
    assert drawn.bytes < len(tokenizer.decode(end).encode())
    assert drawn.name == "text.txt"


def test_numbers_are_those_of_the_definitions(tiny_config):
    source = shake(build(tiny_config("llama", norm_type="rmsnorm")))
    model = shake(shake(build(tiny_config("llama", norm_type="ibnorm_t"))))
    ids = torch.randint(1, 61, (3, 20), generator=torch.Generator().manual_seed(0))
    seen, handles = {}, []
    for name, each in (("old", source), ("new", model)):
        for site, norm in norm_sites(each.model).items():
            note = norm.register_forward_hook(lambda _, args, out, key=(name, site): seen.update({key: out}))
            handles.append(note)
    with torch.no_grad():
        old, new = source(ids).logits[:, :-1], model(ids).logits[:, :-1]
    for handle in handles:
        handle.remove()
    cost = measure(source, model, Text("", ids, 77))
    nats = F.cross_entropy(new.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert cost.bits_per_byte == pytest.approx(nats.item() / 0.6931472 / 77, rel=1e-5)
    kl = F.kl_div(new.log_softmax(-1), old.log_softmax(-1), log_target=True, reduction="sum") / (3 * 19)
    assert cost.kl == pytest.approx(kl.item(), rel=1e-4)
    assert cost.top1 == pytest.approx((old.argmax(-1) == new.argmax(-1)).float().mean().item(), abs=1e-9)
    assert list(cost.sites) == list(norm_sites(model.model))
    for site, found in cost.sites.items():
        y, z = seen["old", site], seen["new", site]
        error = (z - y).square().sum() / (y - y.mean((0, 1))).square().sum()
        assert found.error == pytest.approx(error.item(), rel=1e-4)
        norm = model.model.get_submodule(site)
        width = ((z - norm.bias) / norm.weight).std(-1, correction=0)
        assert (found.row_std, found.least_row_std) == pytest.approx(
            (width.mean().item(), width.min().item()), rel=1e-4
        )


def test_a_model_is_no_distance_from_itself_and_keeps_no_hook(folder):
    source = loaded(folder)
    ids = draw_text("data", "sotu", "test", AutoTokenizer.from_pretrained(folder), 600, 64)
    for other in (source, loaded(folder)):
        cost = measure(source, other, ids)
        assert (cost.kl, cost.top1) == (0, 1)
        assert {site.error for site in cost.sites.values()} == {0.0}
        assert not any(norm._forward_hooks for norm in norm_sites(other).values())


def test_a_massive_activation_takes_the_width_of_its_row_under_layernormalnorm(tiny_config):
    source = shake(build(tiny_config("llama", norm_type="rmsnorm")))
    model = build(tiny_config("llama", norm_type="layernormalnorm", norm_kwargs={"noise": 0.0})).eval()
    model.load_state_dict(source.state_dict(), strict=False)
    with torch.no_grad():
        for each in (source, model):
            each.model.embed_tokens.weight[7, 3] = 1e4
    ids = torch.randint(8, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    plain = measure(source, model, Text("", ids, 77)).sites["layers.0.input_layernorm"]
    ids[0, 0] = 7
    massive = measure(source, model, Text("", ids, 77)).sites["layers.0.input_layernorm"]
    assert plain.least_row_std > 0.7
    assert massive.least_row_std < 0.2 * plain.least_row_std


def test_what_is_not_finite_is_told(folder):
    source, broken = loaded(folder), loaded(folder)
    text = draw_text("data", "sotu", "test", AutoTokenizer.from_pretrained(folder), 300, 64)
    with torch.no_grad():
        broken.model.norm.weight.fill_(0.0)
        assert measure(broken, source, text).sites["norm"].error is None  # of a norm that gives nothing
        broken.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="it gives numbers that are not finite"):
        measure(source, broken, text)


def test_a_conversion_reports_what_each_step_cost(folder, tmp_path, command):
    flags = ["--norm", "ibnorm_t", "--norm_kwargs.lam", "3", "--init", "calibrate", "--calibration_tokens", "2000"]
    code, out, error = command(main, "convert", str(folder), str(tmp_path / "new"), *flags, *QUICK)
    assert (code, error) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-source", "new"]
    found = json.loads((tmp_path / "new" / "report" / "report.json").read_text())
    stages = found["stages"]
    assert list(stages) == ["source", "swapped", "calibrated"]
    assert stages["calibrated"]["kl"] < stages["swapped"]["kl"]
    convert_checkpoint(folder, tmp_path / "kept", "ibnorm_t", norm_kwargs={"lam": 3})
    ids = draw_text("data", "sotu", "test", AutoTokenizer.from_pretrained(folder), 300, 512)
    for name, path in (("source", folder), ("swapped", tmp_path / "kept"), ("calibrated", tmp_path / "new")):
        assert stages[name]["bits_per_byte"] == pytest.approx(measure(loaded(folder), loaded(path), ids).bits_per_byte)
    rows = list(csv.DictReader((tmp_path / "new" / "report" / "sites.csv").open()))
    assert len(rows) == 3 * 5
    page = (tmp_path / "new" / "report" / "report.md").read_text()
    assert "| calibrated | ibnorm_t, lam 3.0, unit raw, standardize layer |" in page
    assert (tmp_path / "new" / "report" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "| calibrated |" in (tmp_path / "new" / "README.md").read_text()
    assert "calibrated" in out
    assert str(tmp_path) not in page + json.dumps(found["stages"])


def test_later_stages_have_a_command_of_their_own(folder, tmp_path, command):
    convert_checkpoint(folder, tmp_path / "same", "ibnorm_l", init="identity")
    flags = ["--tokens", "300", "--scores", "0", "--output", str(tmp_path / "out")]
    code, out, _ = command(main, "convert_report", str(folder), f"healed={tmp_path / 'same'}", *flags)
    assert code == 0
    stages = json.loads((tmp_path / "out" / "report.json").read_text())["stages"]
    assert stages["healed"]["kl"] < 1e-6
    assert stages["healed"]["bits_per_byte"] == pytest.approx(stages["source"]["bits_per_byte"], rel=1e-5)
    assert all(site["error"] < 1e-8 for site in stages["healed"]["sites"].values())
    assert "ibnorm_l, lam 0.0, unit raw, standardize rms" in out


def test_without_the_extras_there_is_no_picture_and_no_score(folder, tmp_path, monkeypatch):
    for module in ("lm_eval", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)
    convert_checkpoint(folder, tmp_path / "same", "ibnorm_l")
    found = report_conversion(folder, {"swapped": tmp_path / "same"}, tmp_path / "out", tokens=300)
    assert found["scored"] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "report.md", "sites.csv"]
    assert "report.png" not in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(ValueError, match=r"scores: got 3, which needs lm-eval: pip install 'hf_ibnorm\[eval\]'"):
        report_conversion(folder, {"swapped": tmp_path / "same"}, tmp_path / "more", tokens=300, scores=3)


@pytest.mark.slow
def test_embedded_scores_are_those_of_the_evaluation_program(folder, tmp_path, command, monkeypatch):
    (tmp_path / "eval.py").write_text("raise SystemExit('of the user')")
    monkeypatch.chdir(tmp_path)
    flags = ["--norm", "ibnorm_l", "--report_tokens", "300", "--report_scores", "3"]
    code, _, error = command(main, "convert", str(folder), str(tmp_path / "new"), *flags)
    assert (code, error) == (0, "")
    found = json.loads((tmp_path / "new" / "report" / "report.json").read_text())
    for stage in found["stages"].values():
        scored = {name: row for name, row in stage["scores"].items() if row["raw"] is not None}
        assert len(scored) == 6
        assert {row["n"] for row in scored.values()} == {3}
    assert "sva_simple" in (tmp_path / "new" / "report" / "report.md").read_text()


BAD = {
    "report_data: got 'nowhere', neither a corpus": ["--report_data", "nowhere"],
    "data: got 'sotu', of no effect without --init calibrate": ["--data", "sotu"],
    "report_tokens: got 300, of no effect with --no_report": ["--no_report"],
    "report_tokens: got 3, must be": ["--report_tokens", "3"],
    "report_scores: got -1, must be": ["--report_scores", "-1"],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line_and_nothing_is_converted(folder, tmp_path, command, message):
    code, _, error = command(
        main, "convert", str(folder), str(tmp_path / "new"), "--norm", "ibnorm_l", *QUICK, *BAD[message]
    )
    assert code == 2
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_what_has_no_tokenizer_or_no_logits_is_converted_without_a_report_only(folder, tmp_path, command):
    words = ["convert", str(folder), str(tmp_path / "new"), "--norm", "ibnorm_l", *QUICK]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    code, _, error = command(main, *words)
    assert (code, error) == (
        2,
        "error: source: got a LlamaModel; only a language model can be measured (--no_report)\n",
    )
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    code, _, error = command(main, *words)
    assert code == 2
    assert error.endswith("has no tokenizer to measure with (--no_report)\n")
    assert not (tmp_path / "new").exists()
    assert command(main, *words[: -len(QUICK)], "--no_report")[0] == 0


def test_stages_must_be_models_made_of_the_source(folder, tmp_path, command, stock_model):
    stock_model("llama", vocab_size=61).save_pretrained(tmp_path / "small")
    words = ["--output", str(tmp_path / "out"), "--tokens", "300", "--scores", "0"]
    stock_model("gpt2", vocab_size=300, n_positions=512).save_pretrained(tmp_path / "other")
    for stage, message in {
        f"other={tmp_path / 'other'}": "stages: other is a GPT2LMHeadModel, the source a LlamaForCausalLM",
        f"small={tmp_path / 'small'}": "stages: small has vocab_size 61, the source 300",
        "healed=nowhere/at-all": "stages: healed: got 'nowhere/at-all', no such directory",
        "healed": "stages: got 'healed', must be NAME=DIR",
        f"source={folder}": "none of them source",
    }.items():
        code, _, error = command(main, "convert_report", str(folder), stage, *words)
        assert code == 2
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
