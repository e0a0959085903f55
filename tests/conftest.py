"""Shared by all tests: few threads, no hub, small models."""

import atexit
import gc
import os
import shutil
import signal
import tempfile
from pathlib import Path

if gc.isenabled():  # up to pytest_collection_finish: what is imported and collected stays, and there is much of it
    gc.disable()
os.environ["HF_HUB_OFFLINE"] = "1"
if "HF_IBNORM_TESTS_WARM" not in os.environ:  # of all processes of a run the first
    os.environ["HF_IBNORM_TESTS_WARM"] = tempfile.mkdtemp(prefix="hf_ibnorm_warm_")
    atexit.register(shutil.rmtree, os.environ["HF_IBNORM_TESTS_WARM"], ignore_errors=True)
# Tokens of the test corpora, for this run of the tests only.
os.environ["HF_IBNORM_CACHE"] = tempfile.mkdtemp(prefix="hf_ibnorm_tests_")

import yaml

if yaml.__with_libyaml__:  # before other libraries derive from it: cards of data sets are read hundreds of times
    yaml.SafeLoader = yaml.CSafeLoader

import pytest
import warm
from hypothesis import settings

for _name in ("SIGHUP", "SIGINT"):  # ignored where tests are started by nohup or in the background
    if signal.getsignal(getattr(signal, _name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, _name), signal.default_int_handler if _name == "SIGINT" else signal.SIG_DFL)
atexit.register(shutil.rmtree, os.environ["HF_IBNORM_CACHE"], ignore_errors=True)
# What a test's budget of examples is multiplied with, in percent: `make test-slow` asks for the second.
settings.register_profile("quick", max_examples=25)
settings.register_profile("thorough", max_examples=100)
settings.load_profile("quick")

SIZES = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
}


def pytest_configure(config):
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # of several processes the one that only deals out the tests
    import torch

    if not torch.cuda.is_available():  # Triton reads it when it is first imported
        os.environ["TRITON_INTERPRET"] = "1"
    from transformers.utils import logging

    from hf_ibnorm.report import plots

    torch.set_num_threads(1)  # faster for models this small, and deaf to what else runs
    logging.disable_progress_bar()
    plots.SETTINGS["figure.dpi"] = 40  # most of the time of a report would be its pictures'


def pytest_collection_finish(session):
    if len(session.items) > 100:
        warm.folder()  # some of them will need it, and need not wait then
    gc.freeze()
    gc.enable()


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command's `main` in this process, which spares the seconds of importing everything again.

    command(main, "words", ...) returns its exit code and what it wrote to standard output and standard error.
    """

    def run(main, *words):
        monkeypatch.setattr("sys.argv", ["command", *words])
        with pytest.raises(SystemExit) as ending:
            main()
        return ending.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def transformers_log(caplog):
    """What Transformers logs, colours included."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()
    logging.set_verbosity(before)


@pytest.fixture
def fixtures() -> Path:
    """Folder of reference numbers."""
    return Path(__file__).parent / "fixtures"


@pytest.fixture
def tiny_config():
    """Factory of configs for models of some 20,000 parameters: tiny_config("llama", norm_type=...)."""

    from helpers import FAMILY

    def make(family: str, **fields):
        shared = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0}
        return FAMILY[family].config(**{**SIZES[family], **shared, **fields})

    return make


@pytest.fixture
def stock_model(tiny_config, tmp_path_factory):
    """Factory of tiny stock models as users have them, loaded from a directory: stock_model("gpt2")."""

    import torch
    from helpers import FAMILY, shake, stock_config, stock_of

    def make(family: str, cls=None, **fields):
        cls = cls or stock_of(FAMILY[family].causal_lm)
        folder = tmp_path_factory.mktemp("stock")
        torch.manual_seed(1)
        shake(cls(stock_config(tiny_config(family, **fields)))).save_pretrained(folder)
        return cls.from_pretrained(folder)

    return make


@pytest.fixture
def source(stock_model, tmp_path):
    """Factory of stock checkpoints on disk, with a tokenizer and a generation config: source("llama")."""

    def make(family, shard="10GB", dtype=None, **fields):
        from train_lm.tokenizer import train_tokenizer, wrap_tokenizer

        fields = {"vocab_size": 300, **fields}
        model = stock_model(family, **fields)
        model.generation_config.max_new_tokens = 7
        if dtype is not None:
            model = model.to(dtype)
        folder = tmp_path / f"{family}-source"
        model.save_pretrained(folder, max_shard_size=shard)
        tokenizer = wrap_tokenizer(train_tokenizer(["some text to learn from " * 9], 300), 64)
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn, before they are closed; each must be in the house's style."""
    import matplotlib.pyplot as plt
    from pictures import check_style

    found, close = [], plt.close
    monkeypatch.setattr(plt, "close", lambda figure: (found.append(figure), close(figure)))
    yield found
    for figure in found:
        check_style(figure)
