"""Code that lies beside a model or a tokenizer is never run, whatever is answered when Transformers asks."""

import ast
import json
import shutil
from pathlib import Path

import pytest
from training import run_on_pages, small_corpus

import eval.__main__
import hf_ibnorm.cli
import train_lm.__main__

pytestmark = pytest.mark.usefixtures(small_corpus.__name__)
ROOT = Path(__file__).parent.parent
CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig as Mine, LlamaForCausalLM as MyModel, PreTrainedTokenizerFast as MyTokenizer
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return run_on_pages(
        folder, "--max_steps", "1", "--warmup_steps", "0", "--log_with", "[]", "--model.norm_type", "rmsnorm"
    )


@pytest.fixture
def hostile(trained, tmp_path):
    """hostile("model" or "tokenizer"): a copy of a finished run whose config wants code that notes that it ran."""

    def make(what):
        final = tmp_path / what
        shutil.copytree(trained / "final", final)
        (final / "mine.py").write_text(CODE.format(marker=str(tmp_path / "it ran")))
        name, fields = {
            "model": ("config.json", {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.MyModel"}),
            "tokenizer": ("tokenizer_config.json", {"AutoTokenizer": [None, "mine.MyTokenizer"]}),
        }[what]
        content = json.loads((final / name).read_text()) | {"auto_map": fields}
        content |= {"model_type": "mine"} if what == "model" else {"tokenizer_class": "MyTokenizer"}
        (final / name).write_text(json.dumps(content))
        return final

    return make


TRAIN = ("--config", "tiny", "--max_steps", "1", "--warmup_steps", "0", "--log_with", "[]", "--run_dir", "NEW")
COMMANDS = {
    "a source to convert": (hf_ibnorm.cli.main, "convert", "IT", "NEW", "--norm", "ibnorm_l"),
    "a model to look at": (hf_ibnorm.cli.main, "analyze", "--model", "IT", "--output", "NEW"),
    "a model to score": (eval.__main__.main, "run", "--model", "IT", "--suite", "embedded", "--output", "NEW"),
    "a start": (train_lm.__main__.main, *TRAIN, "--model.init_from", "IT"),
    "a teacher": (train_lm.__main__.main, *TRAIN, "--teacher", "IT"),
    "a tokenizer": (train_lm.__main__.main, *TRAIN, "--tokenizer", "IT"),
}


@pytest.mark.parametrize("what", ["model", "tokenizer"])
@pytest.mark.parametrize("name", COMMANDS)
def test_code_beside_a_model_is_not_run(hostile, command, monkeypatch, tmp_path, name, what):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    places = {"IT": str(hostile(what)), "NEW": str(tmp_path / "new")}
    main, *words = COMMANDS[name]
    code, _, err = command(main, *(places.get(word, word) for word in words))
    assert not (tmp_path / "it ran").exists()
    if (name, what) != ("a tokenizer", "model"):  # whose config is not needed
        assert code == 2
        assert "code of its own" in err or what == "tokenizer"


def test_everything_of_transformers_is_loaded_in_one_place():
    calls = []
    for path in [path for part in ("hf_ibnorm", "train_lm", "eval") for path in (ROOT / part).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                calls.append(str(path.relative_to(ROOT)))
    # The second is the method of that name, which calls Transformers' own.
    assert sorted(calls) == ["hf_ibnorm/modeling_ibnorm.py", "hf_ibnorm/swap/loading.py"]
