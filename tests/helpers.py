"""What several test files need besides fixtures."""

import torch
from transformers import AutoModelForCausalLM

FAMILIES = ("llama", "gpt2")


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
