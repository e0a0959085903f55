"""Every architecture of Transformers that can be built small: are its norms found, swapped, saved, loaded, put back?

    python benchmarks/architectures.py              # all of them, and the table in docs/results/architectures.md
    python benchmarks/architectures.py Qwen3ForCausalLM ViTForImageClassification

A model of random weights gets another norm, is saved and loaded, and gets its own norms back. What does not work has a
reason in the table.
"""

import argparse
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hf_ibnorm import apply_norm, describe_sites, restore_norm
from hf_ibnorm.sites import STREAM

TABLES = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_CLASSIFICATION")
PAGE = Path(__file__).parent.parent / "docs" / "results" / "architectures.md"
LARGEST = 60_000_000
"""Parameters of a model that is still built; configs without a small size are larger."""
_WIDTHS = (
    "hidden_size",
    "d_model",
    "n_embd",
    "dim",
    "embed_dim",
    "embedding_size",
    "word_embed_proj_dim",
    "hidden_dim",
)
_INNER = ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size")
_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "num_layers",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads", "decoder_attention_heads")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
SMALL = {
    **dict.fromkeys(_WIDTHS, 64),
    **dict.fromkeys(_INNER, 96),
    **dict.fromkeys(_LAYERS, 2),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128),
    **{"num_key_value_heads": 2, "num_experts_per_tok": 2, "head_dim": 16, "d_kv": 16, "vocab_size": 256},
    **{"image_size": 32, "patch_size": 8},
}
"""Field of configs → the most it is left at."""


def small_config(model_type: str, **fields: Any) -> PreTrainedConfig:
    """A config of a model type with small sizes, in its parts too; `fields` are set afterwards."""
    config = _shrunk(AutoConfig.for_model(model_type))
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def _shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    layers = getattr(config, "num_hidden_layers", None)
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _shrunk(value)
        elif name in SMALL and type(value) is int and value > SMALL[name]:
            setattr(config, name, SMALL[name])
        elif name.endswith("layer_types") and isinstance(value, list) and len(value) == layers:  # one for each layer
            setattr(config, name, [*dict.fromkeys(value), *value][: SMALL["num_hidden_layers"]])
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        if isinstance(token := getattr(config, name, None), int) and token >= (
            getattr(config, "vocab_size", None) or 0
        ):
            setattr(config, name, 1)
    return config


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Two short texts, or two small images."""
    config: Any = model.config
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 32) or 32
        size = size if isinstance(size, int) else size[0]
        return {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), size, size)}
    ids = torch.randint(3, config.get_text_config().vocab_size, (2, 12))
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :7]} if config.is_encoder_decoder else {})}


def output_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits, or the first output of a model without."""
    torch.manual_seed(1)  # some draw in evaluation, too
    with torch.no_grad():
        output = model(**inputs)
    logits = getattr(output, "logits", None)
    return output[0] if logits is None else logits


@dataclass
class Result:
    """What became of an architecture."""

    architecture: str
    model_type: str
    outcome: str
    """"works", "refused", "no norm to swap", "not built" or "fails"."""
    reason: str = ""
    sites: str = ""
    """The norms by kind and formula, with their number."""


def check(model_type: str, architecture: str, **fields: Any) -> Result:
    """Build, swap, save, load and put back one architecture."""
    result = Result(architecture, model_type, "not built")
    try:
        with _quickly(60):
            torch.manual_seed(0)
            model = getattr(transformers, architecture)(small_config(model_type, **fields)).eval()
        size = sum(parameter.numel() for parameter in model.parameters())
        if size > LARGEST:
            result.reason = f"{size:,} parameters at its smallest"
            return result
    except Exception as error:
        result.reason = _in_a_line(error)
        return result
    sites = describe_sites(model)
    kinds = Counter(f"{site.kind} {site.computes or 'unknown'}{' 1+w' * (site.gain == '1+w')}" for site in sites)
    result.sites = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    left = sorted({site.problem for site in sites if site.problem})
    result.reason = "; ".join(left)
    if not any(site.kind == STREAM and site.problem is None for site in sites):
        result.outcome, result.reason = "no norm to swap", result.reason or "no module of it is a norm alone"
        return result
    try:
        with _quickly(120):
            result.outcome, notes = "works", []
            faults = _faults(model, notes)
            result.reason = "; ".join(filter(None, [result.reason, *notes]))
    except Exception as error:
        if "its norms cannot be chosen" in str(error):
            result.outcome, result.reason = "refused", _in_a_line(error)
            return result
        faults = [_in_a_line(error)]
    if faults:
        result.outcome, result.reason = "fails", "; ".join(faults)
    return result


def _faults(model: PreTrainedModel, notes: list[str]) -> list[str]:
    """What goes wrong when the norms in the residual stream of a model are swapped and put back.

    What could not be looked at is added to `notes`.
    """
    faults = []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        inputs = inputs_of(model)
        expected = output_of(model, inputs)
    except TimeoutError:
        raise
    except Exception:  # other inputs, or sizes that do not fit: the weights are compared all the same
        inputs = None
        notes.append("its forward pass was not run")
    try:
        same_stock = _reloads(model, inputs)
    except TimeoutError:
        raise
    except Exception:  # of a config that was built too small, which its own checks refuse
        same_stock = False
    if not same_stock:
        notes.append("the stock model is not saved and loaded as it is here, so this was not looked at")
    apply_norm(model, "ibnorm_l", lam=3.0)
    if inputs is not None and torch.equal(output_of(model, inputs), expected):
        faults.append("the new norm changes nothing")
    if same_stock and not _reloads(model, inputs):
        faults.append("it is another model when it is loaded")
    restore_norm(model)
    after = model.state_dict()
    if before.keys() != after.keys() or not all(torch.equal(before[name], after[name]) for name in before):
        faults.append("restored weights differ")
    if inputs is not None and not torch.equal(output_of(model, inputs), expected):
        faults.append("the restored model computes something else")
    return faults


def _reloads(model: PreTrainedModel, inputs: dict[str, torch.Tensor] | None) -> bool:
    """Whether a model is saved and loaded with weights to the bit, and computes the same."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = type(model.config).from_pretrained(folder)  # some model types have another's class
        loaded = type(model).from_pretrained(folder, config=config).eval()
    saved = model.state_dict()
    read = loaded.state_dict()
    same = read.keys() == saved.keys() and all(torch.equal(value, saved[name]) for name, value in read.items())
    # Not to the bit: some add up what experts give in an order of their own.
    return same and (inputs is None or torch.allclose(output_of(loaded, inputs), output_of(model, inputs), atol=1e-5))


@contextmanager
def _quickly(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after some seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def _in_a_line(error: Exception) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 120 else f"{text[:117]}..."


def architectures() -> dict[str, str]:
    """Architecture → model type, of the Auto classes in `TABLES`."""
    found: dict[str, str] = {}
    for table in TABLES:
        for model_type, names in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").items():
            name = names if isinstance(names, str) else names[0]
            own = name.lower().startswith(model_type.replace("_", "").replace("-", ""))  # others share the class
            if not model_type.startswith("ibnorm_") and (own or name not in found):
                found[name] = model_type
    return found


def page(results: list[Result]) -> str:
    """The table, as Markdown."""
    outcomes = Counter(result.outcome for result in results)
    lines = [
        "# Which architectures work",
        "",
        "Made by `python benchmarks/architectures.py`: each architecture is built small, of random weights; the norms "
        "in its residual stream are swapped, the model is saved and loaded, the norms are put back.",
        "",
        f"Transformers {transformers.__version__}, torch {torch.__version__}: {len(results)} architectures; "
        + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
        + ". A norm that is not identified, or that the model's own code looks into, stays as it is; the last column "
        "says why.",
        "",
        "| architecture | model type | outcome | norms | what stays, and why |",
        "| --- | --- | --- | --- | --- |",
    ]
    for result in sorted(results, key=lambda result: result.architecture.lower()):
        cells = (result.architecture, f"`{result.model_type}`", result.outcome, result.sites, result.reason)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Check all architectures, or some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", nargs="*", help="names of classes of Transformers (default: all, and the page)")
    names = parser.parse_args().architecture
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    known = architectures()
    results = []
    for name in names or known:
        results.append(check(known[name], name))
        print(*[results[-1].outcome.ljust(16), name, results[-1].reason], flush=True)
    print(Counter(result.outcome for result in results), file=sys.stderr)
    if not names:
        PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
