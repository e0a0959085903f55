"""Configurations of the registered models: the stock ones plus `norm_type` and `norm_kwargs`.

The norm is resolved when a config is made: `norm_type` becomes the registry's spelling and `norm_kwargs` holds every
option with its value, so that a later change of a default never changes an old checkpoint.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config, LlamaConfig

from .norms import NORMS, norm_name, resolve_norm_kwargs

DEFAULT_NORM = "ibnorm_l"
_OPTION_NAMES = {option for entry in NORMS.values() for option in entry.defaults}


class NormConfigMixin:
    """Resolves and checks the norm fields; the two config classes differ only in where their eps is."""

    norm_eps_field: str
    norm_type: str
    norm_kwargs: dict | None

    def __post_init__(self, **kwargs: Any) -> None:
        # Transformers keeps unknown keyword arguments as attributes: a misplaced norm option would be silently ignored.
        for key in kwargs:
            if key.startswith("norm_"):
                raise ValueError(f"{key}: no such config field; norm fields are norm_type and norm_kwargs")
            if key in _OPTION_NAMES:
                raise ValueError(f"{key}: got {kwargs[key]!r} as a config field; write norm_kwargs={{{key!r}: ...}}")
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.resolve_norms()

    def validate_norms(self) -> None:
        """Part of Transformers' validation, which runs at init, at `.validate()` and before saving."""
        resolve_norm_kwargs(self.norm_type, self.norm_kwargs, getattr(self, self.norm_eps_field))

    def resolve_norms(self) -> None:
        """Bring `norm_type` and `norm_kwargs` to their resolved form.

        Raises:
            ValueError, TypeError: naming the field, the value and what is allowed.
        """
        eps = getattr(self, self.norm_eps_field)
        self.norm_kwargs = resolve_norm_kwargs(self.norm_type, self.norm_kwargs, eps)
        self.norm_type = norm_name(self.norm_type)


@strict
class IBNormLlamaConfig(NormConfigMixin, LlamaConfig):
    """LlamaConfig plus the norm of every site.

    Args:
        norm_type: a name of `hf_ibnorm.NORMS` (default `ibnorm_l`).
        norm_kwargs: its options, e.g. `{"lam": 4.0}`; those left out take their defaults, `eps` takes `rms_norm_eps`
            (layernormalnorm keeps its own 1e-5).
        **kwargs: every field of LlamaConfig.

    Raises:
        ValueError, TypeError: unknown norm or option (with the nearest name), or a value that is not allowed.
        huggingface_hub.errors.StrictDataclassError: a field has the wrong type, or was set to a bad value later and is
            validated or saved.
    """

    model_type = "ibnorm_llama"
    norm_eps_field = "rms_norm_eps"

    norm_type: str = DEFAULT_NORM
    norm_kwargs: dict | None = None


@strict
class IBNormGPT2Config(NormConfigMixin, GPT2Config):
    """GPT2Config plus the norm of every site; as `IBNormLlamaConfig`, with `layer_norm_epsilon` as the model's eps."""

    model_type = "ibnorm_gpt2"
    norm_eps_field = "layer_norm_epsilon"

    norm_type: str = DEFAULT_NORM
    norm_kwargs: dict | None = None


__all__ = ["IBNormGPT2Config", "IBNormLlamaConfig"]
