"""apply_norm, restore_norm, swapped_norms, norm_sites: what is swapped, what is kept, and what is refused."""

import copy
import gc
import pickle
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import weakref

import peft
import pytest
import torch
from helpers import FAMILIES, FAMILY, FINAL, LAST_BLOCK, STOCK_NORM, TABLES, build, shake, stock_of, tokens
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from warm import python

from hf_ibnorm import (
    NORMS,
    DynamicTanh,
    IBNorm,
    IBNormLlamaForCausalLM,
    apply_norm,
    norm_sites,
    restore_norm,
    set_lam,
    swapped_norms,
)

pytestmark = pytest.mark.oldest


@torch.no_grad()
def logits(model):
    return model(tokens()).logits


@pytest.fixture(autouse=True)
def silent_about_dropped_biases():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the new norms have no place")
        yield


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NORMS)
def test_patched_saved_and_loaded_is_the_same_model_to_the_bit(stock_model, family, name, tmp_path):
    model = stock_model(family)
    before = logits(model)
    assert apply_norm(model, name) is model
    assert type(model) is FAMILY[family].causal_lm
    after = shake(model)(tokens()).logits
    assert not torch.equal(before, after)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), after)
    assert sorted(loaded.state_dict()) == sorted(model.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_patched_model_is_like_one_loaded(stock_model, family, tmp_path):
    model = apply_norm(stock_model(family), "ibnorm_t", lam=0.3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.name_or_path = loaded.config.name_or_path = ""
    assert set(vars(model)) - set(vars(loaded)) == {"_norms_before"}
    unlike = {key for key in vars(loaded) if str(vars(model)[key]) != str(vars(loaded)[key])}
    unlike -= {"_weight_conversions"}  # in older Transformers, what was renamed while loading which file
    assert unlike == set()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NORMS)
def test_restoring_gives_back_the_stock_model(stock_model, family, name):
    model = stock_model(family)
    cls, config, modules, before = type(model), model.config, dict(model.named_modules()), logits(model)
    apply_norm(model, name)
    assert restore_norm(model) is model
    assert type(model) is cls
    assert type(model.base_model) is type(modules[model.base_model_prefix])
    assert model.config is model.base_model.config is config
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_restoring_keeps_trained_gains(stock_model, family):
    model = apply_norm(stock_model(family), "ibnorm_l")
    shake(model)
    trained = {name: norm.weight.clone() for name, norm in norm_sites(model).items()}
    restore_norm(model)
    assert all(torch.equal(norm.weight, trained[name]) for name, norm in norm_sites(model).items())


def test_trained_biases_that_rmsnorm_cannot_hold_are_warned_of(stock_model):
    model = shake(apply_norm(stock_model("llama"), "ibnorm_l"))
    with pytest.warns(UserWarning, match=r"no place for trained layers\.0\.input_layernorm\.bias, .*: 5 dropped"):
        restore_norm(model)
    with pytest.warns(UserWarning, match=r"trained h\.0\.ln_1\.bias.*: 5 dropped"):
        apply_norm(stock_model("gpt2"), "rmsnorm")
    with pytest.warns(UserWarning, match="weight"):
        apply_norm(stock_model("llama"), "ibnorm_l", elementwise_affine=False)


def test_an_untrained_bias_is_dropped_without_a_word(stock_model):
    model = apply_norm(stock_model("llama"), "ibnorm_l")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore_norm(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bias_dropped_on_the_way_is_back_after_restoring(stock_model, family):
    model = stock_model(family)
    before = logits(model)
    apply_norm(model, "rmsnorm")
    assert all(getattr(norm, "bias", None) is None for norm in norm_sites(model).values())
    assert torch.equal(logits(restore_norm(model)), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_applying_twice_replaces_and_restores_to_the_first(stock_model, family, tmp_path):
    model = stock_model(family)
    before = logits(model)
    apply_norm(model, "layernormalnorm", noise=0.5)
    apply_norm(model, "ibnorm_t", lam=1.5)
    assert all(isinstance(norm, IBNorm) and norm.lam_value == 1.5 for norm in norm_sites(model).values())
    assert model.config.norm_type == "ibnorm_t"
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    assert torch.equal(logits(restore_norm(model)), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_own_models_are_patched_and_restored_too(tiny_config, family, tmp_path):
    model = shake(build(tiny_config(family, norm_type="ibnorm_l")))
    before, fields = logits(model), (model.config.norm_type, model.config.norm_kwargs)
    apply_norm(model, "ibnorm_t")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    restore_norm(model)
    assert torch.equal(logits(model), before)
    assert (model.config.norm_type, model.config.norm_kwargs) == fields


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_choose_where_and_the_rest_stays(stock_model, family, tmp_path):
    model = stock_model(family)
    before = logits(model)
    apply_norm(model, "ibnorm_l", sites=LAST_BLOCK[family], lam=1.0)
    apply_norm(model, "dyt", sites=[FINAL[family]])
    kinds = [type(norm) for norm in norm_sites(model).values()]
    assert kinds == [NORMS[STOCK_NORM[family]].cls] * 2 + [IBNorm] * 2 + [DynamicTanh]
    assert model.config.norm_type == STOCK_NORM[family]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    apply_norm(model, STOCK_NORM[family])
    torch.testing.assert_close(logits(model), before)
    assert torch.equal(logits(restore_norm(model)), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_outside_the_chosen_sites_are_the_same_modules_still(tiny_config, family):
    model = shake(build(tiny_config(family, norm_type="ibnorm_l", norm_kwargs={"learn_lam": True})))
    before = norm_sites(model)
    apply_norm(model, "ibnorm_t", sites=LAST_BLOCK[family])
    kept = [name for name, norm in norm_sites(model).items() if norm is before[name]]
    assert len(kept) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_device_dtype_training_mode_and_frozen_gains_are_kept(stock_model, family):
    model = stock_model(family).to(torch.bfloat16).train()
    model.requires_grad_(False)
    kept = norm_sites(model)
    next(iter(kept.values())).eval()
    apply_norm(model, "ibnorm_l", learn_lam=True)
    modes = [norm.training for norm in norm_sites(model).values()]
    assert modes == [False, True, True, True, True]
    for name, norm in norm_sites(model).items():
        assert norm.weight is kept[name].weight
        for parameter in norm.parameters():
            assert parameter.dtype == torch.bfloat16
            assert not parameter.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_the_meta_device_stays_there(stock_model, family):
    model = apply_norm(stock_model(family).to("meta"), "ibnorm_l")
    assert all(tensor.is_meta for norm in norm_sites(model).values() for tensor in norm.parameters())
    restore_norm(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_lam_is_put_back_with_the_norms(tiny_config, family):
    model = shake(build(tiny_config(family, norm_type="ibnorm_l")))
    before = logits(model)
    with swapped_norms(model, "ibnorm_t", sites=FINAL[family]):
        set_lam(model, 1.0)
    assert torch.equal(logits(model), before)
    apply_norm(model, "ibnorm_t", sites=FINAL[family])
    set_lam(model, 1.0)
    restore_norm(model)
    assert torch.equal(logits(model), before)
    assert model.config.norm_kwargs["lam"] == 4.0


def test_applying_again_replaces_what_was_learned_and_says_so(stock_model):
    model = apply_norm(stock_model("llama"), "ibnorm_l", learn_lam=True, lam=1.0)
    for norm in norm_sites(model).values():
        nn.init.constant_(norm.theta, 9.0)
    with pytest.warns(UserWarning, match=r"trained layers\.0\.input_layernorm\.theta.*: 5 dropped"):
        apply_norm(model, "ibnorm_l", learn_lam=True, lam=1.0)
    assert next(iter(norm_sites(model).values())).current_lam().item() == pytest.approx(1.0)


def test_a_warning_that_is_made_an_error_leaves_the_model_as_it_was(stock_model):
    model = stock_model("gpt2")
    modules, before = dict(model.named_modules()), logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="no place"):
            apply_norm(model, "rmsnorm")
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model), before)
    assert model.config.model_type == "gpt2"


def test_a_bias_that_comes_back_is_frozen_like_its_norm(stock_model):
    model = apply_norm(stock_model("gpt2"), "rmsnorm")
    model.requires_grad_(False)
    restore_norm(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_taken_by_their_qualified_names_too(stock_model, family, tmp_path):
    model = stock_model(family)
    first, *rest = norm_sites(model)
    apply_norm(model, "ibnorm_l", sites=[first])
    sites = norm_sites(model)
    assert isinstance(sites[first], IBNorm)
    assert not any(isinstance(sites[name], IBNorm) for name in rest)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_like_an_option_in_a_stock_config_is_left_alone(stock_model, family, tmp_path):
    model = stock_model(family)
    model.config.bias = False  # as configs of related architectures have it
    model.save_pretrained(tmp_path / "stock")
    apply_norm(model, "ibnorm_l").save_pretrained(tmp_path / "patched")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    assert loaded.config.bias is False
    assert torch.equal(logits(loaded), logits(model))
    FAMILY[family].causal_lm.from_pretrained(tmp_path / "stock", norm_type="ibnorm_l")


def test_swapping_some_norms_of_a_partly_offloaded_model_leaves_the_others_working(tiny_config, tmp_path):
    shake(build(tiny_config("llama"))).save_pretrained(tmp_path)
    names = ("embed_tokens", "layers.0", "layers.1", "rotary_emb", "norm")
    device_map = {f"model.{name}": "disk" if name == "layers.0" else "cpu" for name in names} | {"lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "off")
    before = logits(model)
    with swapped_norms(model, "ibnorm_t", sites="norm"):
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    restore_norm(apply_norm(model, "dyt", sites="norm"))
    assert torch.equal(logits(model), before)


def test_sites_of_a_derived_class_can_be_read(stock_model):
    class Derived(IBNormLlamaForCausalLM):
        """As FSDP2 makes one of every class it shards."""

    model = apply_norm(stock_model("llama"), "ibnorm_l")
    model.__class__ = Derived
    assert len(norm_sites(model)) == 5
    with pytest.raises(TypeError, match="got Derived"):
        apply_norm(model, "ibnorm_t")


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_go_on_firing_and_their_handles_go_on_working(stock_model, family):
    model, seen = stock_model(family), []
    norm = next(iter(norm_sites(model).values()))
    handles = [
        norm.register_forward_hook(lambda module, args, output: seen.append("forward")),
        norm.register_forward_pre_hook(lambda module, args: seen.append("before")),
        norm.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward")),
        norm.weight.register_hook(lambda grad: seen.append("weight")),
    ]
    apply_norm(model, "ibnorm_l")
    for patched in (True, False):
        model(tokens(), labels=tokens()).loss.backward()
        assert sorted(seen) == ["backward", "before", "forward", "weight"]
        seen.clear()
        if patched:
            restore_norm(model)
    apply_norm(model, "ibnorm_l")
    for handle in handles:
        handle.remove()
    model(tokens(), labels=tokens()).loss.backward()
    assert seen == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gain_tied_between_sites_stays_tied(stock_model, family):
    model = stock_model(family)
    first, second, *_ = norm_sites(model).values()
    second.weight = first.weight
    apply_norm(model, "ibnorm_l")
    first, second, *_ = norm_sites(model).values()
    assert first.weight is second.weight


@pytest.mark.parametrize("family", FAMILIES)
def test_a_norm_shared_by_two_sites_stays_shared(stock_model, family):
    model = stock_model(family)
    block = model.base_model.get_submodule(LAST_BLOCK[family].removesuffix(".*"))
    names = TABLES[family].in_block
    setattr(block, names[1], getattr(block, names[0]))
    shared, before = getattr(block, names[0]), logits(model)
    apply_norm(model, "ibnorm_l")
    assert getattr(block, names[0]) is getattr(block, names[1])
    assert isinstance(getattr(block, names[0]), IBNorm)
    restore_norm(model)
    assert getattr(block, names[0]) is getattr(block, names[1]) is shared
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_embeddings_stay_tied_and_survive_saving(stock_model, family, tmp_path):
    model = apply_norm(stock_model(family, tie_word_embeddings=True), "ibnorm_l")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_base_models_are_patched_too(stock_model, family, tmp_path):  # and heads, in test_heads.py
    ours = FAMILY[family].auto_classes["AutoModel"]
    model = stock_model(family, stock_of(ours))
    before = model(tokens())[0]
    apply_norm(model, "ibnorm_l")
    after = model(tokens())[0]
    assert not torch.equal(before, after)
    model.save_pretrained(tmp_path)
    assert type(model) is ours
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(tokens())[0], after)
    assert torch.equal(restore_norm(model)(tokens())[0], before)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_recorded_after_patching(stock_model, family):
    model = apply_norm(stock_model(family), "ibnorm_l")
    out = model(tokens(), output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(model.base_model(tokens())[0], out.hidden_states[-1])


def test_hidden_states_are_recorded_where_no_registered_model_was_ever_built():
    # In a process of its own: any registered model built before would have made its class known to the recorder.
    code = """
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        from hf_ibnorm import apply_norm
        config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                             vocab_size=61)
        model = apply_norm(LlamaForCausalLM(config), "ibnorm_l")
        assert len(model(torch.arange(8)[None], output_hidden_states=True).hidden_states) == 3
    """
    subprocess.run([python(), "-c", textwrap.dedent(code)], check=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_implementation_set_after_patching_reaches_attention(stock_model, family):
    model = apply_norm(stock_model(family), "ibnorm_l")
    model.set_attn_implementation("eager")
    assert model(tokens(), output_attentions=True).attentions[0] is not None
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    assert {config._attn_implementation for config in configs} == {"eager"}
    assert {type(config).__name__ for config in configs} == {type(model.config).__name__}
    restore_norm(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", FAMILIES)
def test_changes_of_the_config_while_patched_survive_restoring(stock_model, family):
    model = apply_norm(stock_model(family), "ibnorm_l")
    model.resize_token_embeddings(70)
    restore_norm(model)
    assert model.config.vocab_size == 70
    assert not any(key.startswith("norm_") for key in model.config.to_dict())
    assert model.config.model_type == family


def test_two_models_that_share_a_config_do_not_meet(stock_model):
    one = stock_model("llama")
    two = type(one)(one.config)
    apply_norm(one, "ibnorm_l")
    assert two.config.model_type == "llama"
    assert not any(isinstance(module, IBNorm) for module in two.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_pickles_of_a_patched_model_work_and_can_be_restored(stock_model, family):
    model = stock_model(family)
    before = logits(model)
    apply_norm(model, "ibnorm_t")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))
        assert torch.equal(logits(restore_norm(twin)), before)
        assert isinstance(next(iter(norm_sites(model).values())), IBNorm)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_optimizer_built_before_still_trains_the_gains(stock_model, family):
    model = stock_model(family)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    apply_norm(model, "ibnorm_l")
    before = [norm.weight.clone() for norm in norm_sites(model).values()]
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    assert not any(torch.equal(a, norm.weight) for a, norm in zip(before, norm_sites(model).values(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_draws_no_random_numbers(stock_model, family):
    model = stock_model(family)
    state = torch.get_rng_state()
    restore_norm(apply_norm(model, "layernormalnorm"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_norms_puts_back_exactly_what_was_there(stock_model, family):
    model = stock_model(family)
    before, config, norms = logits(model), model.config, norm_sites(model)
    states = {name: copy.deepcopy(norm.state_dict()) for name, norm in norms.items()}
    seen = []

    def inside():
        with swapped_norms(model, "ibnorm_l", lam=2.0) as swapped:
            assert swapped is model
            assert not torch.equal(logits(model), before)
            for norm in norm_sites(model).values():  # as training would
                nn.init.constant_(norm.weight, 7.0)
            norm.register_forward_hook(lambda *_: seen.append("hook left behind"))
            norm.register_full_backward_hook(lambda *_: seen.append("hook left behind"))
            norm.weight.requires_grad_(False)
            model.resize_token_embeddings(70)
            raise KeyError

    with pytest.raises(KeyError):
        inside()
    assert model.config is config
    for name, norm in norm_sites(model).items():
        assert norm is norms[name]
        assert all(torch.equal(value, states[name][key]) for key, value in norm.state_dict().items())
        assert all(parameter.requires_grad for parameter in norm.parameters())
    assert torch.equal(logits(model)[..., :61], before)
    assert config.vocab_size == 70  # what was done to the rest stays done
    seen.clear()
    model(tokens(), labels=tokens()).loss.backward()
    assert seen == []
    with pytest.raises(ValueError, match="nothing to restore"):
        restore_norm(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_norms_nest_and_leave_an_earlier_patch_restorable(stock_model, family):
    model = stock_model(family)
    stock = logits(model)
    apply_norm(model, "ibnorm_l")
    patched = logits(model)
    with swapped_norms(model, "dyt"), swapped_norms(model, "layernormalnorm", sites="*.0.*"):
        assert not torch.equal(logits(model), patched)
        model.train()
    assert all(norm.training for norm in norm_sites(model).values())
    assert torch.equal(logits(model.eval()), patched)
    assert torch.equal(logits(restore_norm(model)), stock)


def test_a_graph_made_inside_swapped_norms_can_go_backward_outside(stock_model):
    model = stock_model("llama")
    with swapped_norms(model, "ibnorm_l"):
        loss = model(tokens(), labels=tokens()).loss
    loss.backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_restoring_twice_or_a_loaded_model_is_an_error_that_says_why(stock_model, family, tmp_path):
    model = stock_model(family)
    with pytest.raises(ValueError, match="has the stock norms, there is nothing to restore"):
        restore_norm(model)
    restore_norm(apply_norm(model, "ibnorm_l"))
    with pytest.raises(ValueError, match="nothing to restore"):
        restore_norm(model)
    apply_norm(model, "ibnorm_l").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not patched by apply_norm; `hf-ibnorm convert`"):
        restore_norm(AutoModelForCausalLM.from_pretrained(tmp_path))


def test_an_unknown_family_is_an_error_that_says_what_is_known(stock_model):
    class Mine(type(stock_model("llama"))):
        """A subclass: its own methods would be lost with the class."""

    for model in (nn.Linear(2, 2), Mine(stock_model("llama").config), torch.compile(stock_model("llama"))):
        for use in (restore_norm, lambda model: apply_norm(model, "ibnorm_l")):
            with pytest.raises(TypeError, match=r"model: got \w+, must be a model of Transformers, stock or"):
                use(model)
    with pytest.raises(TypeError, match="got Linear"):
        norm_sites(nn.Linear(2, 2))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("ibnrm_l",), {}, "norm: unknown norm 'ibnrm_l'"),
        (("ibnorm_l",), {"lamda": 2.0}, "norm_kwargs.lamda: .*did you mean 'lam'"),
        (("ibnorm_l",), {"lam": -1.0}, "norm_kwargs.lam: got -1.0"),
        (("ibnorm_l", "layers.7.*"), {}, r"sites: 'layers.7.\*' matches no site; sites are .*N from 0 to 1"),
        (("ibnorm_l", []), {}, "sites: got no glob"),
        (("ibnorm_l", [0]), {}, r"sites: got \[0\], must be a glob"),
        (("ibnorm_l", 0), {}, "sites: got 0, must be a glob"),
        (("ibnorm_l",), {"site": "norm"}, "site: no such argument of apply_norm; write sites="),
        (("ibnorm_l",), {"norm_kwargs": {"lam": 2}}, "norm_kwargs: no such argument .* lam=2.0"),
        ((IBNorm(4),), {}, "norm: got a IBNorm, must be the name of a norm"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(stock_model, family, arguments, options, message):
    model = stock_model(family)
    modules, before = dict(model.named_modules()), logits(model)
    with pytest.raises((ValueError, TypeError), match=message):
        apply_norm(model, *arguments, **options)
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model), before)
    assert model.config.model_type == family


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_would_not_load_again_is_refused(stock_model, family):
    model = stock_model(family)
    model.base_model.extra = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"would differ from a IBNorm\w+ in .*extra\.bias"):
        apply_norm(model, "ibnorm_l")
    assert model.config.model_type == family


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["parametrized", "pruned"])
def test_an_error_at_the_last_norm_leaves_all_as_they_were(stock_model, family, how):
    model = stock_model(family)
    last = norm_sites(model).popitem()[1]
    if how == "parametrized":
        parametrize.register_parametrization(last, "weight", nn.Identity())
    else:
        prune.identity(last, "weight")
    before, state, expected = norm_sites(model), model.state_dict(), logits(model)
    with pytest.raises(ValueError, match=rf"weight of the norm {FINAL[family]} is computed from other tensors"):
        apply_norm(model, "ibnorm_l")
    assert all(a is b for a, b in zip(norm_sites(model).values(), before.values(), strict=True))
    assert type(model) is stock_of(FAMILY[family].causal_lm)
    assert model.config.model_type == family
    assert model.state_dict().keys() == state.keys()
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="there is nothing to restore"):
        restore_norm(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_at_the_last_norm_restores_none(stock_model, family):
    model = apply_norm(stock_model(family), "ibnorm_l")
    prune.identity(norm_sites(model).popitem()[1], "weight")
    before, expected = norm_sites(model), logits(model)
    with pytest.raises(ValueError, match="is computed from other tensors"):
        restore_norm(model)
    assert all(a is b for a, b in zip(norm_sites(model).values(), before.values(), strict=True))
    assert torch.equal(logits(model), expected)
    prune.remove(norm_sites(model).popitem()[1], "weight")
    restore_norm(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unexpected_norm_is_refused(stock_model, family):
    model = stock_model(family)
    model.base_model.q_norm = nn.LayerNorm(4)
    with pytest.raises(RuntimeError, match="expected 5 norms, found 6 .*q_norm"):
        norm_sites(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_under_peft_keeps_the_adapter_working(stock_model, family, tmp_path):
    stock = stock_model(family)
    model = peft.get_peft_model(stock, peft.LoraConfig(init_lora_weights=False)).eval()
    before = logits(model)
    assert apply_norm(model, "ibnorm_l") is model
    assert isinstance(model, peft.PeftModel)
    assert type(model.get_base_model()) is FAMILY[family].causal_lm
    assert all(name.startswith("base_model.model.") for name in norm_sites(model))
    assert not any(p.requires_grad for norm in norm_sites(model).values() for p in norm.parameters())
    after = logits(model)
    assert model.peft_config["default"].base_model_name_or_path is None
    model.save_pretrained(tmp_path)
    fresh = peft.PeftModel.from_pretrained(apply_norm(stock_model(family), "ibnorm_l"), tmp_path).eval()
    assert torch.equal(logits(fresh), after)
    assert torch.equal(logits(restore_norm(model)), before)
    assert model.peft_config["default"].base_model_name_or_path == model.name_or_path == stock.config.name_or_path


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["patched", "loaded"])
def test_an_adapter_never_names_the_stock_checkpoint_as_its_base(stock_model, family, how, tmp_path):
    stock = stock_model(family)
    folder = stock.name_or_path
    cls = FAMILY[family].causal_lm
    model = apply_norm(stock, "ibnorm_l") if how == "patched" else cls.from_pretrained(folder, norm_type="ibnorm_l")
    assert model.name_or_path == model.config.name_or_path == ""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    wrapped.save_pretrained(tmp_path)  # PEFT would read the base's config here, and find a stock one
    with pytest.raises((OSError, ValueError)):
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)


def test_default_targets_of_peft_hold_for_a_patched_model_in_a_fresh_process(stock_model):
    code = """
        import sys, peft
        from transformers import AutoModelForCausalLM
        from hf_ibnorm import apply_norm
        model = apply_norm(AutoModelForCausalLM.from_pretrained(sys.argv[1]), "ibnorm_l")
        assert model.config.model_type == "ibnorm_llama"
        peft.get_peft_model(model, peft.LoraConfig())
    """
    folder = stock_model("llama").name_or_path
    subprocess.run([python(), "-c", textwrap.dedent(code), folder], check=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_dispatched_by_accelerate_keep_their_hooks(stock_model, family):
    from accelerate import cpu_offload, dispatch_model

    model = stock_model(family)
    before = logits(model)
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    patched = logits(apply_norm(model, "ibnorm_l"))
    assert all(hasattr(norm, "_hf_hook") for norm in norm_sites(model).values())
    assert torch.equal(logits(restore_norm(model)), before)
    assert torch.equal(logits(apply_norm(stock_model(family), "ibnorm_l")), patched)
    offloaded = cpu_offload(stock_model(family), torch.device("cpu"))
    with pytest.raises(ValueError, match="is offloaded; patch before dispatching"):
        apply_norm(offloaded, "ibnorm_l")


def test_nothing_that_stock_transformers_registered_changes():
    code = """
        import sys
        import torch, transformers.monkey_patching
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        stock = [LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=61)),
                 GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=61))]

        def entries(value, depth=1):
            "What a registry, class or object holds, without triggering lazy imports; modules are seen one by one."
            if isinstance(value, type(sys)):
                return
            if isinstance(value, dict):
                yield from dict.items(value)
            elif isinstance(value, (list, tuple)):
                yield from enumerate(value)
            if depth and hasattr(value, "__dict__") and not callable(value) or isinstance(value, type):
                for key, inner in vars(value).items():
                    yield key, inner
                    if depth:
                        yield from (((key, k), v) for k, v in entries(inner, depth - 1))

        def record():
            found = {}
            for name, module in list(sys.modules.items()):
                if name.startswith("transformers.") or name == "torch.nn.init":
                    for key, value in list(vars(module).items()):
                        if not key.startswith("__"):
                            found[name, key] = value
                            found.update({(name, key, inner): v for inner, v in entries(value)})
            return found

        def use(model):
            model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
            model.generate(torch.arange(8)[None], max_new_tokens=2)

        for model in stock:
            use(model)
        get_checkpoint_conversion_mapping("llama")  # makes its table when it is first asked
        before = record()
        import hf_ibnorm
        for model in stock:
            for norm in ("ibnorm_l", "layernormalnorm"):
                use(hf_ibnorm.apply_norm(model, norm))
            use(hf_ibnorm.restore_norm(model))
        after = record()
        simple = (int, float, str, bool, type(None))
        changed = [key for key, value in before.items()
                   if after.get(key) is not value and not (isinstance(value, simple) and after.get(key) == value)]
        print(len(before), len(after), changed)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, capture_output=True, text=True)
    looked_at, _, changed = done.stdout.split(" ", 2)
    assert int(looked_at) > 10_000
    assert changed.strip() == "[]"


def test_two_threads_patching_two_models_do_not_meet(stock_model):
    models = [stock_model(family) for family in FAMILIES for _ in range(4)]
    before, ones = [logits(model) for model in models], torch.nn.init.ones_
    expected = [logits(apply_norm(copy.deepcopy(model), "ibnorm_l", lam=1.0 + i)) for i, model in enumerate(models)]
    errors = []

    def work(i, model):
        try:
            for _ in range(5):
                apply_norm(model, "ibnorm_l", lam=1.0 + i)
                assert torch.equal(logits(model), expected[i])
                restore_norm(model)
                assert torch.equal(logits(model), before[i])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(models)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert torch.nn.init.ones_ is ones


def test_two_threads_never_initialize_at_once(stock_model, monkeypatch):
    # Transformers replaces functions of torch.nn.init meanwhile: interleaved, they would stay replaced for good.
    original, inside, most = LlamaRotaryEmbedding.__init__, [], []

    def slow(self, *args, **kwargs):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        original(self, *args, **kwargs)
        inside.pop()

    models = [stock_model("llama") for _ in range(4)]
    monkeypatch.setattr(LlamaRotaryEmbedding, "__init__", slow)  # a part of every Llama
    threads = [threading.Thread(target=apply_norm, args=(model, "ibnorm_l")) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) >= 4
    assert max(most) == 1


def test_a_restored_model_is_freed_like_any_other(stock_model):
    model = restore_norm(apply_norm(stock_model("llama"), "ibnorm_l"))
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
