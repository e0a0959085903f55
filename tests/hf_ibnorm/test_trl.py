"""TRL's trainers with a reference model, on a model whose norms were swapped in memory."""

import pytest
import torch
import trl
from datasets import Dataset
from helpers import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_ibnorm import apply_norm

pytestmark = pytest.mark.oldest

QUIET = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no", "max_steps": 2}
PREFERENCES = {
    "DPO": ({"prompt": "some ", "chosen": "text", "rejected": "learn"}, {}, {}),
    "KTO": ({"prompt": "some ", "completion": "text", "label": True}, {}, {}),
    "GRPO": (
        {"prompt": "some "},
        {"num_generations": 2, "max_completion_length": 4, "beta": 0.1},
        {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions]},
    ),
}


# How TRL finds the reference model does not depend on the family.
@pytest.mark.parametrize(
    ("kind", "family"),
    [
        pytest.param(kind, family, marks=[] if (kind == "KTO") == (family == "gpt2") else [pytest.mark.slow])
        for kind in PREFERENCES
        for family in FAMILIES
    ],
)
def test_a_reference_model_is_loaded_from_where_the_swapped_one_was_saved(source, kind, family, tmp_path):
    row, options, more = PREFERENCES[kind]
    folder = source(family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    arguments = {
        "args": getattr(trl, f"{kind}Config")(tmp_path / "run", per_device_train_batch_size=2, **options, **QUIET),
        "train_dataset": Dataset.from_list([row] * 4),
        "processing_class": tokenizer,
        **more,
    }
    model = apply_norm(AutoModelForCausalLM.from_pretrained(folder), "ibnorm_l", lam=2.0)
    make = getattr(trl, f"{kind}Trainer")
    with pytest.raises(ValueError, match=r"cannot load its reference model.*model\.save_pretrained\(.*from_pretrained"):
        make(model, **arguments)

    model.save_pretrained(tmp_path / "swapped")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "swapped")
    trainer = make(model, **arguments)
    assert type(trainer.ref_model) is type(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert all(torch.equal(value, before[key]) for key, value in trainer.ref_model.state_dict().items())
    assert trainer.ref_model.config.norm_kwargs["lam"] == 2.0
    trainer.train()
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
