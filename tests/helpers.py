"""What several test files need besides fixtures."""

import torch
from hypothesis import settings
from transformers import AutoModelForCausalLM

from hf_ibnorm.configuration_ibnorm import NORM_FIELDS
from hf_ibnorm.swap.families import FAMILIES as REGISTERED

FAMILY = {family.config.stock_model_type: family for family in REGISTERED}
FAMILIES = tuple(FAMILY)
TABLES = {name: family.config.norm_pin for name, family in FAMILY.items()}
FINAL = {name: table.final for name, table in TABLES.items()}
FIRST_BLOCK = {name: f"{table.blocks}.0.*" for name, table in TABLES.items()}
LAST_BLOCK = {name: f"{table.blocks}.1.*" for name, table in TABLES.items()}
STOCK_NORM = {name: table.stock for name, table in TABLES.items()}


def examples(budget):
    """Settings for so many random examples, the same ones each time; for a part of them in the profile "quick"."""
    part = settings().max_examples / 100
    return settings(max_examples=max(5, round(part * budget)), deadline=None, derandomize=True, database=None)


def stock_of(cls):
    """The stock class that one of ours, a config or a model, stands in for."""
    return cls.__bases__[1]


def tokens(seed=0):
    """Two rows of 16 tokens for a vocabulary of 61; none is 0, the tests' end of text."""
    return torch.randint(1, 61, (2, 16), generator=torch.Generator().manual_seed(seed))


def build(config, seed=0, cls=AutoModelForCausalLM):
    """A model of `config` with its initial weights."""
    torch.manual_seed(seed)
    return cls.from_config(config)


def shake(model):
    """Move every parameter off its initial value, so that a test of loading cannot pass by initializing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def stock_config(config):
    """The stock config with every field of one of ours but the norms."""
    fields = {key: value for key, value in config.to_dict().items() if key not in (*NORM_FIELDS, "model_type")}
    return stock_of(type(config))(**fields)


@torch.no_grad()
def smoothed_loss(model, ids, smoothing=0.1):
    """Loss of predicting each next token, with labels smoothed: what `label_smoothing_factor` asks of a Trainer."""
    logits = model(ids).logits[:, :-1].transpose(1, 2)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:], label_smoothing=smoothing)
