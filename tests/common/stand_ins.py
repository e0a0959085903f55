"""Testers for Transformers' common tests of models: its own classes (NORMS=stock) or those with our norms (NORMS=ours).

`tests/hf_ibnorm/test_common.py` puts this file beside the tests of Transformers' source distribution and has pytest run
it there.
"""

import os
import unittest

import torch
import transformers
from tests.test_modeling_common import floats_tensor, ids_tensor

import hf_ibnorm
from hf_ibnorm.swap.families import stand_in
from tests import test_modeling_common  # of the source distribution

IS_OURS = os.environ["NORMS"] == "ours"
BATCH, LENGTH, IMAGE, PATCH = 3, 7, 30, 2
SIZES = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {"vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = ("ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification")
FAMILIES = {
    "Llama": ({**TEXT, "num_key_value_heads": 2}, ("Model", "ForCausalLM", *HEADS)),
    "GPT2": (TEXT, ("Model", "LMHeadModel", *HEADS)),
    "Qwen3": ({**TEXT, "num_key_value_heads": 2, "head_dim": 8}, ("Model", "ForCausalLM", *HEADS)),
    "Gemma2": ({**TEXT, "num_key_value_heads": 2, "head_dim": 8}, ("Model", "ForCausalLM", HEADS[0], HEADS[2])),
    "OPT": ({**TEXT, "ffn_dim": 37, "word_embed_proj_dim": 32}, ("Model", "ForCausalLM", *HEADS[:2])),
    "Bert": (TEXT, ("Model", "ForMaskedLM", "LMHeadModel", *HEADS)),
    "ViT": ({"image_size": IMAGE, "patch_size": PATCH}, ("Model", "ForImageClassification", "ForMaskedImageModeling")),
}
"""Family → fields of its config, and its classes."""


class Tester:
    """What the common tests ask about a family: a config, inputs, and their sizes."""

    is_training = True
    batch_size, image_size, patch_size, num_labels, type_sequence_label_size = BATCH, IMAGE, PATCH, 3, 2
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99

    def __init__(self, family):
        self.family = family
        length = (IMAGE // PATCH) ** 2 + 1 if family == "ViT" else LENGTH
        self.seq_length = self.encoder_seq_length = self.key_length = length

    def get_config(self):
        fields, _ = FAMILIES[self.family]
        stock = getattr(transformers, f"{self.family}Config")
        return stand_in(stock)(norm_type="ibnorm_l", **SIZES, **fields) if IS_OURS else stock(**SIZES, **fields)

    def prepare_config_and_inputs_for_common(self):
        if self.family == "ViT":
            return self.get_config(), {"pixel_values": floats_tensor([BATCH, 3, IMAGE, IMAGE])}
        ids = ids_tensor([BATCH, LENGTH], 99).clamp(min=3)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def classes_of(family):
    """The common tests for the classes of a family."""

    class Tests(test_modeling_common.ModelTesterMixin, unittest.TestCase):
        test_resize_embeddings = family != "ViT"
        test_can_init_all_missing_weights_before_2023 = True  # the year is read from the file of the config's class
        all_model_classes = tuple(
            getattr(hf_ibnorm, f"IBNorm{family}{head}") if IS_OURS else getattr(transformers, f"{family}{head}")
            for head in FAMILIES[family][1]
        )

        def setUp(self):
            self.model_tester = Tester(family)

    Tests.__name__ = Tests.__qualname__ = f"Test{family}"
    return Tests


globals().update({f"Test{family}": classes_of(family) for family in FAMILIES})
