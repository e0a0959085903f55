"""Publishing a finished run: its card, and what a hub on this machine has after a push."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from hub import hub_of
from huggingface_hub import ModelCard, constants, snapshot_download
from training import config, metrics, pages, run, run_on_pages
from transformers import AutoModelForCausalLM
from warm import python

from hf_ibnorm.base.errors import UserError
from hf_ibnorm.base.files import sha256_tensors, write_json
from hf_ibnorm.report.runs import Run
from hf_ibnorm.swap.remote_code import add_remote_code
from train_lm.push import main as push
from train_lm.push import model_card
from train_lm.session import names_on_hub

ROOT = Path(__file__).parents[2]
OVERRIDES = "[[norm, {type: layernormalnorm, kwargs: {noise: 0.1}}]]"
REPO = "alice/tiny"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, not to be changed."""
    folder = tmp_path_factory.mktemp("trained") / "my_run"
    return run_on_pages(folder, "--model.norm_overrides", OVERRIDES, "--log_with", "[]")


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of it."""
    shutil.copytree(trained, tmp_path / "my_run")
    return tmp_path / "my_run"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub without repositories, which this process talks to as alice; what is sent to commands, too."""
    (tmp_path / "hub").mkdir()
    with hub_of(tmp_path / "hub", tmp_path / "home") as (handler, environment):
        endpoint = environment["HF_ENDPOINT"]
        for name in (name for name in os.environ if name.lower().endswith("_proxy")):
            monkeypatch.delenv(name)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", "alice")
        yield handler, {**environment, "HF_TOKEN": "alice"}


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != "manifest.json"}


def downloaded(folder):
    """What the hub gives of the repository, by file; `folder` is for the cache."""
    return contents(snapshot_download(REPO, cache_dir=folder))


def score(raw, stderr=None, normalized=None, metric="acc", **more):
    details = {"metric": metric, "at_chance": False}
    return {"raw": raw, "stderr": stderr, "normalized": normalized, "chance": None, "n": 40, "details": details, **more}


def scores(smoke=False):
    rows = {
        "austen_test": score(2.0458, metric="bits_per_byte"),
        "sva_simple": score(0.75, 0.0693, 50.0),
        "gone": {**score(None), "n": None},
    }
    notes = ["gone: left out, it is not in /home/alice/mirror/gone", *(["SMOKE - not a leaderboard score"] * smoke)]
    return {"suite": "embedded", "smoke": smoke, "model": "/x", "average": None, "benchmarks": rows, "notes": notes}


def card_of(folder):
    text = (folder / "final" / "README.md").read_text(encoding="utf-8")
    return ModelCard(text).data, text


def test_what_is_pushed_is_what_the_run_left_byte_by_byte_in_one_commit(finished, hub, tmp_path, command):
    before = contents(finished / "final")
    code, out, err = command(push, str(finished), "--repo", REPO)
    assert (code, err) == (0, "")
    assert out.endswith(f"pushed: {hub[1]['HF_ENDPOINT']}/{REPO}\n")
    after = contents(finished / "final")
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"README.md", "loss.png"}
    assert downloaded(tmp_path / "cache") == after
    assert [sorted(names) for names in hub[0].commits[REPO]] == [sorted(after)]


def test_a_repository_is_private_unless_asked_otherwise(finished, hub, command):
    assert command(push, str(finished), "--repo", REPO)[0] == 0
    assert command(push, str(finished), "--repo", "alice/open", "--public")[0] == 0
    assert hub[0].private == {REPO}


def test_a_public_repository_is_pushed_to_only_where_that_is_asked_for(finished, hub, tmp_path, command):
    (tmp_path / "hub" / REPO).mkdir(parents=True)
    code, _, err = command(push, str(finished), "--repo", REPO)
    assert code == 2
    assert err.startswith(f"error: repo: {REPO} is public: --public pushes there; the model is in {finished}/final ")
    assert contents(tmp_path / "hub" / REPO) == {}
    assert command(push, str(finished), "--repo", REPO, "--public")[0] == 0
    hub[0].private.add(REPO)
    code, out, _ = command(push, str(finished), "--repo", REPO, "--public")
    assert code == 0
    assert f"{REPO} was private and stays so" in out


def test_a_pushed_model_loads_by_its_name_in_a_fresh_process(finished, hub, command):
    assert command(push, str(finished), "--repo", REPO)[0] == 0
    code = (
        "import hf_ibnorm\n"
        "from hf_ibnorm.base.files import sha256_tensors\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model, tokenizer = (auto.from_pretrained('{REPO}') for auto in (AutoModelForCausalLM, AutoTokenizer))\n"
        "print(sha256_tensors(model.state_dict().items()), model.model.norm.noise, len(tokenizer))"
    )
    done = subprocess.run([python(), "-c", code], capture_output=True, text=True, cwd=ROOT, env=hub[1])
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(finished / "final")
    assert done.stdout.split() == [sha256_tensors(model.state_dict().items()), "0.1", "300"]
    assert f"{REPO}/model.safetensors" in hub[0].asked


def test_a_second_push_updates_and_leaves_no_weights_of_the_first(finished, hub, tmp_path, command):
    assert command(push, str(finished), "--repo", REPO)[0] == 0
    first = downloaded(tmp_path / "cache")
    (tmp_path / "hub" / REPO / "LICENSE").write_text("of its owner")
    AutoModelForCausalLM.from_pretrained(finished / "final").save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    for name in ("model.safetensors", "manifest.json"):
        (finished / "final" / name).unlink()
    for path in (tmp_path / "parts").glob("*.safetensors*"):
        shutil.copy(path, finished / "final")
    write_json(finished / "scores.json", scores())
    assert command(push, str(finished), "--repo", REPO, "--scores", str(finished))[0] == 0
    second = downloaded(tmp_path / "cache")
    assert second.pop("LICENSE") == b"of its owner"
    assert second == contents(finished / "final")
    assert second["README.md"] != first["README.md"]
    assert sum(name.endswith(".safetensors") for name in second) > 1
    assert len(hub[0].commits[REPO]) == 2


def test_the_card_says_what_the_model_is_and_how_it_was_trained(finished, command):
    code, out, _ = command(push, str(finished))
    assert (code, out) == (
        0,
        f"card: {finished / 'final' / 'README.md'}; nothing is pushed without a repository (--repo)\n",
    )
    data, text = card_of(finished)
    assert data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hf_ibnorm", "ibnorm_l", "layernormalnorm"],
    }
    rows, record = metrics(finished), json.loads((finished / "environment.json").read_text())
    for told in (
        "# my\\_run\n",
        "`ibnorm_l` with `lam=4,",
        "norm at `norm`: `layernormalnorm` with `noise=0.1,",
        f"of {record['parameters']:,} parameters",
        f"tokens: {rows[-1]['tokens']:,}, ",
        f"**{rows[-1]['eval_loss']:.4f}** nats per token",
        *(record[name] for name in ("train_sha", "validation_sha", "tokenizer_sha")),
        "text: `austen`",
        "steps: 10 of 8 sequences of 32 tokens",
        f"torch {record['versions']['torch']}",
        "(loss.png)",
        "Not scored.",
        "one run with one seed (0)",
        'AutoModelForCausalLM.from_pretrained("path/to/this/directory")',
    ):
        assert told in text, told
    assert (finished / "final" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_and_the_picture_are_the_same_each_time(finished, command):
    for _ in range(2):
        assert command(push, str(finished))[0] == 0
        made = contents(finished / "final")
        shutil.copytree(finished / "final", finished / "before", dirs_exist_ok=True)
    assert made == contents(finished / "before")


def test_scores_are_in_the_card_and_its_front_matter(finished, hub, command):
    (finished / "scores").mkdir()
    write_json(finished / "scores" / "scores.json", scores())
    assert command(push, str(finished), "--repo", REPO)[0] == 0  # the hub looks at the front matter, too
    data, text = card_of(finished)
    found = {(each.dataset_name, each.metric_type): each.metric_value for each in data.eval_results}
    assert found == {("austen_test", "bits_per_byte"): 2.0458, ("sva_simple", "acc"): 0.75}
    assert data.model_name == "tiny"
    assert "| `sva_simple` | `acc` | 0.750 ± 0.069 | 50.00 | 40 |" in text
    assert "| `austen_test` | `bits_per_byte` (lower is better) | 2.046 | - | 40 |" in text
    assert "| `gone` | `acc` | - | - | - |" in text
    assert "- gone: left out, it is not in gone\n" in text
    assert "SMOKE" not in text


def test_scores_of_a_smoke_test_are_marked_and_stay_out_of_the_front_matter(finished, command):
    write_json(finished / "scores.json", scores(smoke=True))
    assert command(push, str(finished), "--scores", str(finished))[0] == 0
    data, text = card_of(finished)
    assert data.eval_results is None
    assert text.count("SMOKE") == 1
    assert "**SMOKE - not leaderboard scores**" in text
    assert "0.750 ± 0.069" in text


def test_no_path_of_the_machine_and_no_markup_of_a_name_gets_into_the_card(finished):
    settings = yaml.safe_load((finished / "config.yaml").read_text())
    settings |= {"corpus": "/home/alice/a`b\n# c|.jsonl", "tokenizer": "C:\\Users\\alice\\tok", "corpus_config": "---"}
    settings |= {"validation_corpus": "../alice/valid/", "cache_dir": "/home/alice/cache"}
    settings["model"]["init_from"] = "/home/alice/llama/final"
    (finished / "config.yaml").write_text(yaml.safe_dump(settings))
    (finished / "scores").mkdir()
    write_json(finished / "scores" / "scores.json", scores())
    moved = finished.rename(finished.parent / "<b>*alice*")
    text = model_card(Run.read(moved))
    data = ModelCard(text).data
    assert data.base_model is None
    assert text.count("alice") == 2  # in the name of the run
    assert text.startswith("---\nlibrary_name")
    assert "\n# \\<b\\>\\*alice\\*\n" in text
    assert "- text: ``a`b # c|.jsonl``, configuration `---`, split `train`\n" in text
    assert "- tokenizer: `tok`\n" in text
    assert "on `valid`\n" in text
    assert "started from `final`" in text
    assert str(finished.parent) not in text


def test_what_came_from_the_hub_is_named_in_full(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    flags = ["--corpus", "allenai/c4", "--validation_corpus", "text/*.txt", "--tokenizer", "models/llama"]
    wanted = config("x", *flags, "--model.init_from", "meta/llama", "--model.norm_type", "null")
    assert names_on_hub(wanted) == ["allenai/c4", "meta/llama"]
    found = Run.read(finished)
    found.config["model"]["init_from"] = "meta/llama"
    assert ModelCard(model_card(found)).data.base_model is None
    found.environment["on_hub"] = ["allenai/c4", "meta/llama"]
    found.config["corpus"] = "allenai/c4"
    text = model_card(found)
    assert ModelCard(text).data.base_model == "meta/llama"
    assert ModelCard(text).data.datasets == ["allenai/c4"]
    assert "started from `meta/llama`" in text
    assert "text: `allenai/c4`, split `train`" in text
    assert "undertrained" not in text


def test_offline_there_is_the_card_and_how_to_push_later(finished, command):
    code, out, err = command(push, str(finished), "--repo", REPO, "--public")
    assert (code, err) == (0, "")
    assert out == (
        f"card: {finished / 'final' / 'README.md'}; offline, nothing is pushed; later: python -m train_lm.push "
        f"{finished} --repo {REPO} --public\n"
    )
    assert f'from_pretrained("{REPO}")' in card_of(finished)[1]


def nobody(monkeypatch, hub):
    monkeypatch.delenv("HF_TOKEN")


def another(monkeypatch, hub):
    monkeypatch.setenv("HF_TOKEN", "bob")


def no_hub(monkeypatch, hub):
    monkeypatch.setattr(constants, "ENDPOINT", constants.ENDPOINT + "/nowhere")


def nothing(monkeypatch, hub):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def no_upload(monkeypatch, hub):
    monkeypatch.setattr(hub[0], "do_PUT", lambda self: self.body() and self.answer(403))


REFUSALS = {
    "no login": (nobody, "the Hub answered 401 (Invalid username or password.): log in with `hf auth login`"),
    "a login of another": (another, "the Hub answered 403 (You have no right to create a model in alice.)"),
    "no hub": (no_hub, "the Hub answered 404: no such repository, or HF_ENDPOINT is no Hub"),
    "nothing there": (nothing, "http://127.0.0.1:9 cannot be used: ConnectError: "),
    "no upload": (no_upload, "the Hub answered 403: this login may not write there"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_hub_that_refuses_is_one_line_and_the_model_is_there_with_its_card(name, finished, hub, command, monkeypatch):
    before = contents(finished / "final")
    change, message = REFUSALS[name]
    change(monkeypatch, hub)
    code, _, err = command(push, str(finished), "--repo", REPO)
    assert code == 2
    assert err.startswith(f"error: repo: {REPO} has not got the model, ")
    assert message in err
    assert err.endswith(f"; again: python -m train_lm.push {finished} --repo {REPO}\n")
    assert err.count("\n") == 1
    after = contents(finished / "final")
    assert {key: after[key] for key in before} == before
    assert {"README.md", "loss.png"} <= after.keys()
    assert hub[0].commits == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repo", "tiny"], "repo: got 'tiny', must be NAMESPACE/NAME"),
        (["--repo", "a/b/c"], "repo: got 'a/b/c', must be NAMESPACE/NAME"),
        (["--repo", "alice/../x"], "repo: got 'alice/../x', must be NAMESPACE/NAME"),
        (["--public"], "public: given without --repo NAMESPACE/NAME"),
        (["--scores", "/nowhere"], "scores: /nowhere has no scores.json"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(words, message, finished, hub, command):
    before = contents(finished / "final")
    code, _, err = command(push, str(finished), *words)
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert contents(finished / "final") == before
    assert not list(hub[0].root.iterdir())


def test_a_run_that_is_not_finished_is_one_line(finished, command):
    shutil.rmtree(finished / "final")
    code, _, err = command(push, str(finished))
    assert (code, err) == (2, f"error: run: {finished} is not a finished run directory (it has no final)\n")


def test_pickles_are_never_pushed(finished, hub, tmp_path, command):
    final = finished / "final"
    (final / "training_args.bin").write_bytes(b"\x80")
    (final / ".README.md.x").write_text("left by a kill")
    code, out, _ = command(push, str(finished), "--repo", REPO)
    assert code == 0
    assert "not pushed: training_args.bin (" in out
    assert not {"training_args.bin", ".README.md.x"} & downloaded(tmp_path / "cache").keys()
    (final / "model.safetensors").rename(final / "pytorch_model.bin")
    (final / "README.md").unlink()
    code, _, err = command(push, str(finished), "--repo", REPO)
    assert code == 2
    assert err == (
        f"error: run: {final} has the pickles pytorch_model.bin, training_args.bin, must have safetensors: save it "
        "with save_pretrained\n"
    )
    assert not (final / "README.md").exists()


def test_weights_that_lack_a_part_are_refused(finished, command):
    final = finished / "final"
    write_json(final / "model.safetensors.index.json", {"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    code, _, err = command(push, str(finished))
    assert (code, err) == (2, f"error: run: {final} has no model-00001-of-00002.safetensors\n")


def test_a_model_that_was_given_its_code_is_still_what_was_saved(finished, command):
    add_remote_code(finished / "final")
    assert command(push, str(finished))[0] == 0
    assert "trust_remote_code=True" in card_of(finished)[1]


@pytest.fixture
def small_texts(monkeypatch):
    monkeypatch.setattr("train_lm.corpus.load_corpus", pages)


@pytest.mark.usefixtures("small_texts")
def test_a_training_pushes_at_its_end_if_asked(hub, tmp_path, capsys):
    run(tmp_path / "run", "--max_steps", "2", "--log_with", "[]", "--push_to_hub", REPO)
    assert f"pushed: {hub[1]['HF_ENDPOINT']}/{REPO}" in capsys.readouterr().out
    assert downloaded(tmp_path / "cache") == contents(tmp_path / "run" / "final")
    assert hub[0].private == {REPO}
    run(tmp_path / "run", "--max_steps", "2", "--log_with", "[]", "--resume", "auto")
    assert "already finished" in capsys.readouterr().out


@pytest.mark.usefixtures("small_texts")
def test_a_training_that_cannot_push_is_finished_and_says_how_to_push_later(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    flags = ("--max_steps", "2", "--log_with", "[]")
    with pytest.raises(UserError, match=rf"401 .*; again: python -m train_lm.push {tmp_path / 'run'} --repo {REPO}$"):
        run(tmp_path / "run", *flags, "--push_to_hub", REPO)
    run(tmp_path / "plain", *flags)
    there, plain = contents(tmp_path / "run" / "final"), contents(tmp_path / "plain" / "final")
    assert {name: there[name] for name in plain} == plain  # and no card where none was asked for
    assert there.keys() - plain.keys() == {"README.md", "loss.png"}
    run(tmp_path / "run", *flags, "--push_to_hub", REPO, "--resume", "auto")
    assert "already finished" in capsys.readouterr().out


@pytest.mark.slow
def test_one_of_two_processes_pushes(hub, tmp_path):
    launch = [python(), "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    words = ["--config", "tiny", "--run_dir", tmp_path / "run", "--push_to_hub", REPO, "--log_with", "[]"]
    done = subprocess.run(
        [*launch, "-m", "train_lm", *map(str, words)], capture_output=True, text=True, cwd=ROOT, env=hub[1]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pushed: ") == 1
    assert len(hub[0].commits[REPO]) == 1
    assert downloaded(tmp_path / "cache") == contents(tmp_path / "run" / "final")
