"""Where the libraries around a model choose by model type or by names of classes: every such place, and ours in it.

Installed packages are read for strings and imports that name Llama or GPT-2. A place that is not below is new: it fails
a test, and somebody decides whether ours belong there too.
"""

import ast
import os
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
from accelerate.utils import MegatronLMPlugin
from helpers import FAMILIES, FAMILY, STOCK_NORM, smoothed_loss, tokens
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_ibnorm import apply_norm
from hf_ibnorm.swap.families import FAMILIES as REGISTERED

pytestmark = pytest.mark.oldest

PACKAGES = ("transformers", "peft", "trl", "accelerate", "lm_eval")
# A model's own folder is about that model.
SKIPPED = ("transformers/models", "transformers/cli", "accelerate/test_utils", "lm_eval/tasks")
KEPT = ("transformers/models/auto",)
STOCK = re.compile(r"llama|gpt2|(Llama|GPT2)[A-Z]\w*")
QUOTED = re.compile(rb"[\"'](llama|gpt2|(Llama|GPT2)[A-Z]\w*)[\"']|import .*\b(Llama|GPT2)[A-Z]")

# Tables that hold ours where they hold the stock model: file → names, as patterns.
ENTERED = {
    "transformers/models/auto/configuration_auto.py": "CONFIG_MAPPING_NAMES|MODEL_NAMES_MAPPING",
    "transformers/models/auto/modeling_auto.py": r"\w+_MAPPING_NAMES",
    "transformers/models/auto/tokenization_auto.py": "TOKENIZER_MAPPING_NAMES",
    "peft/utils/constants.py": r"TRANSFORMERS_MODELS_TO_\w+_MAPPING",
}
# Everything else, and why nothing is to be done.
DECIDED = {
    # What the table of that name in configuration_auto.py is made from.
    "transformers/models/auto/auto_mappings.py": "CONFIG_MAPPING_NAMES",
    # Prompts in attention: our Llama is there. GPT-2's is chosen by comparing with "gpt2" itself: PEFT refuses ours.
    "peft/tuners/adaption_prompt/config.py": "TRANSFORMERS_MODEL_CONFIG",
    "peft/tuners/adaption_prompt/model.py": r"AdaptionPromptModel\._create_adapted_attentions",
    # A name for what was found by its attributes; a list for Transformers before 4.38.
    "peft/tuners/tuners_utils.py": "replicate_layers",
    "peft/peft_model.py": r"PeftModelForCausalLM\.prepare_inputs_for_generation",
    # Megatron-LM's own models, with its own norms: refused, for Accelerate would take ours for the stock ones.
    "accelerate/utils/dataclasses.py": "parse_(llama|gpt2)_config",
    # Of tokenizers, which are the stock ones.
    "transformers/models/auto/tokenization_auto.py": r"AutoTokenizer\.from_pretrained",
    "transformers/convert_slow_tokenizer.py": "SLOW_TO_FAST_CONVERTERS",
    "transformers/convert_slow_tokenizers_checkpoints_to_fast.py": "tokenizer_class_name",
    # GGUF files hold stock models, and load as such; `hf-ibnorm convert` takes them from there.
    "transformers/modeling_gguf_pytorch_utils.py": "TENSOR_PROCESSORS|load_gguf_checkpoint",
    "transformers/integrations/ggml.py": r"|GGUF\w+|GGUF\w+\.__init__",
    "transformers/integrations/gguf/gguf_tokenizer_mapping.py": r".*",
    # A norm of BitNet's own linear layers.
    "transformers/integrations/bitnet.py": r"(Auto)?BitLinear\.__init__",
}


def sources(package):
    """Python files of an installed package: the folder it lies in, and where they are in it."""
    root = Path(find_spec(package).origin).parents[1]
    for folder, below, files in os.walk(root / package):
        inside = Path(folder).relative_to(root).as_posix()
        if inside in SKIPPED:
            below[:] = [name for name in below if f"{inside}/{name}" in KEPT]
        else:
            yield from ((root, f"{inside}/{name}") for name in files if name.endswith(".py"))


def mentions(content):
    """Name of a table, function or class of a module → what it says of Llama or GPT-2, docstrings apart."""
    found, todo = {}, [(ast.parse(content), "")]
    while todo:
        node, name = todo.pop()
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = f"{name}.{node.name}" if name else node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign) and not name:
            name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target).partition("[")[0]
        said = {ast.Constant: "value", ast.alias: "name"}.get(type(node))
        if said and isinstance(word := getattr(node, said), str) and STOCK.fullmatch(word):
            found.setdefault(name, set()).add(word)
        todo += [(child, name) for child in ast.iter_child_nodes(node)]
    return found


def test_every_place_that_names_llama_or_gpt2_was_decided():
    undecided, tables = [], {}
    for package in PACKAGES:
        for root, file in sources(package):
            content = (root / file).read_bytes()
            for name, words in mentions(content).items() if QUOTED.search(content) else ():
                if re.fullmatch(ENTERED.get(file, "-"), name):
                    tables.setdefault(file, set()).add(name)
                elif not re.fullmatch(DECIDED.get(file, "-"), name):
                    undecided.append(f"{file}, {name or 'imports'}: {', '.join(sorted(words))}")
    assert not undecided, (
        "these places know the stock models and not ours; enter ours (hf_ibnorm/swap/families.py) and the place in "
        "ENTERED, or say in DECIDED why not:\n" + "\n".join(undecided)
    )
    assert len(tables["transformers/models/auto/modeling_auto.py"]) >= 6  # or it looks where nothing is
    assert len(tables["peft/utils/constants.py"]) >= 6
    for config in (family.config() for family in REGISTERED):
        config.to_dict()  # PEFT asks for it before it looks into its tables
    for file, names in tables.items():
        module = import_module(file.removesuffix(".py").replace("/", "."))
        for name in names:
            table = getattr(module, name)
            for family in REGISTERED:
                if family.stock_model_type in table:
                    assert family.model_type in table, f"{file}, {name}: has no {family.model_type}"


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.mark.parametrize("kind", ["registered", "patched", "wrapped by PEFT"])  # remote code: in test_remote_code.py
def test_smoothed_labels_are_shifted_as_for_the_stock_model(stock_model, family, kind, tmp_path):
    stock = stock_model(family)
    stock.save_pretrained(tmp_path / "stock")
    model = apply_norm(stock, STOCK_NORM[family])
    if kind != "patched":
        model.save_pretrained(tmp_path / "ours")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    if kind == "wrapped by PEFT":
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    args = TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to=[], use_cpu=True, disable_tqdm=True)
    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    loss = Trainer(model, args, eval_dataset=rows).evaluate()["eval_loss"]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert loss == pytest.approx(smoothed_loss(stock, tokens()).item(), rel=1e-4)


def test_trainer_gives_a_stock_gpt2_s_losses_for_one_token_too_many_and_ours_right(stock_model, tmp_path):
    counts = {}  # how many tokens Trainer divides by, for 2 rows of 16
    for model in (stock_model("gpt2"), apply_norm(stock_model("gpt2"), STOCK_NORM["gpt2"])):
        args = TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True)
        rows = [{"input_ids": row, "labels": row} for row in tokens()]
        trainer = Trainer(model, args, eval_dataset=rows)
        per_token = model(tokens(), labels=tokens()).loss.item()
        counts[type(model).__name__] = 2 * 15 * per_token / trainer.evaluate()["eval_loss"]
    right = 30 if hasattr(trainer, "_loss_shifts_labels") else 32  # older releases count so for every model
    assert counts == pytest.approx({"GPT2LMHeadModel": 32, "IBNormGPT2LMHeadModel": right}, rel=1e-3)


def test_prompts_in_attention_are_those_of_the_stock_llama_and_refused_for_gpt2(stock_model):
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    logits = []
    for model in (stock_model("llama"), apply_norm(stock_model("llama"), STOCK_NORM["llama"])):
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, config)
        prompted = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        assert len(prompted) == 4
        for parameter in prompted:
            torch.nn.init.normal_(parameter)
        logits.append(wrapped.eval()(input_ids=tokens()).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="Unsupported model type for adaption prompt: 'ibnorm_gpt2'"):
        peft.get_peft_model(apply_norm(stock_model("gpt2"), "ibnorm_l"), config)


def test_megatron_would_build_the_stock_norms_and_is_refused(stock_model, family):
    plugin = MegatronLMPlugin()
    plugin.set_network_size_args(stock_model(family), {"input_ids": tokens()})
    with pytest.raises(ValueError, match=rf"MEGATRON_LM for a {FAMILY[family].causal_lm.__name__}.*use FSDP"):
        plugin.set_network_size_args(apply_norm(stock_model(family), "ibnorm_l"), {"input_ids": tokens()})
