"""Checkpoints that carry their code: loaded, used and saved again in a process that has no hf_ibnorm."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from helpers import FAMILIES, FAMILY, FINAL, build, shake, smoothed_loss, tokens
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_ibnorm.swap.remote_code import add_remote_code

pytestmark = pytest.mark.oldest

WITHOUT_THE_PACKAGE = """
    import sys
    sys.modules["hf_ibnorm"] = None  # importing it fails from here on
    import torch
    from safetensors.torch import load_file
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM, AutoConfig, Trainer, TrainingArguments

    def load(auto, path):
        return auto.from_pretrained(path, trust_remote_code=True).eval()

    models = []
    for folder in sys.argv[1:]:
        expected = load_file(folder + "/expected.safetensors")
        x = expected["tokens"]
        model = load(AutoModelForCausalLM, folder + "/lm")
        models.append(model)
        assert type(model).__module__.startswith("transformers_modules.")
        assert torch.equal(model(x).logits, expected["logits"])
        for name in expected.keys() - {"tokens", "logits", "smoothed"}:
            assert torch.equal(load(getattr(transformers, name), folder + "/" + name)(x)[0], expected[name]), name

        args = TrainingArguments(folder, label_smoothing_factor=0.1, report_to=[], use_cpu=True, disable_tqdm=True)
        rows = [{"input_ids": row, "labels": row} for row in x]
        loss = Trainer(model, args, eval_dataset=rows).evaluate()["eval_loss"]
        assert abs(loss - expected["smoothed"].item()) < 1e-4, loss

        model.save_pretrained(folder + "/again")
        assert torch.equal(load(AutoModelForCausalLM, folder + "/again")(x).logits, expected["logits"])
        assert torch.equal(load(AutoModel, folder + "/again")(x)[0], load(AutoModel, folder + "/lm")(x)[0])
        config = AutoConfig.from_pretrained(folder + "/again", trust_remote_code=True)
        fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        fresh.train()(x, labels=x).loss.backward()
    assert not any(name.startswith("hf_ibnorm.") for name in sys.modules)

    del sys.modules["hf_ibnorm"]
    import hf_ibnorm
    for model in models:
        for use in (lambda: hf_ibnorm.apply_norm(model, "dyt"), lambda: hf_ibnorm.set_lam(model, 1.0)):
            try:
                use()
            except (TypeError, ValueError) as error:
                assert "import hf_ibnorm before" in str(error), error
            else:
                raise AssertionError("classes of the checkpoint's own code are not the package's")
"""


def with_its_code(tiny_config, family, folder):
    """Write a model of every Auto class, carrying its code, and what each computes."""
    final = {"type": "layernormalnorm", "kwargs": {"backend": "reference"}}
    fields = {"norm_type": "ibnorm_t", "norm_overrides": {FINAL[family]: final}, "pad_token_id": 0}
    fields["norm_kwargs"] = {"lam": 0.3, "backend": "reference"}
    model = shake(build(tiny_config(family, **fields)))
    expected = {"tokens": tokens(), "logits": model(tokens()).logits, "smoothed": smoothed_loss(model, tokens())}
    made = {"lm": model}
    for name in FAMILY[family].auto_classes:
        made[name] = shake(build(tiny_config(family, **fields), cls=getattr(transformers, name)))
        expected[name] = made[name](tokens())[0]
    for name, each in made.items():
        each.save_pretrained(folder / name)
        written = add_remote_code(folder / name)
        assert all(path.parent == folder / name and path.is_file() for path in written)
    save_file({key: value.contiguous() for key, value in expected.items()}, folder / "expected.safetensors")


def test_it_loads_and_saves_again_without_the_package_to_the_bit(tiny_config, tmp_path):
    folders = [tmp_path / family for family in FAMILIES]
    for family, folder in zip(FAMILIES, folders, strict=True):
        with_its_code(tiny_config, family, folder)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    code = textwrap.dedent(WITHOUT_THE_PACKAGE)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, folders)], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_with_the_package_imported_its_own_classes_are_used(tiny_config, tmp_path):
    model = shake(build(tiny_config("llama")))
    model.save_pretrained(tmp_path)
    add_remote_code(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    loaded.save_pretrained(tmp_path / "again")  # the code does not come along, so nothing may point at it
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_a_folder_that_is_no_checkpoint_of_ours_is_left_alone(stock_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        add_remote_code(tmp_path)
    stock_model("gpt2").save_pretrained(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="model_type: got 'gpt2' .* must be .*ibnorm_llama"):
        add_remote_code(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
