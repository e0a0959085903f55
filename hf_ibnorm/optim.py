"""What an optimizer needs to know about a model with these norms."""

from torch import nn


def no_decay_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that take no weight decay: everything that is not a matrix.

    That is every gain, bias and scalar of a norm, whatever the norm and wherever it sits, and the biases of linear
    layers. HF Trainer's own list knows nn.LayerNorm and some name patterns only, and would decay custom norms at
    GPT-2's `ln_*` sites.

    Args:
        model: any module, before it is wrapped or sharded.

    Returns:
        Sorted names, as in `model.named_parameters()`.
    """
    return sorted(name for name, parameter in model.named_parameters() if parameter.ndim < 2)
