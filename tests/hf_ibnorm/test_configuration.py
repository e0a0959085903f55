"""The norm fields of a config: a norm per site, loading with other norms, stock checkpoints, 500 random configs."""

import json
import re
import tempfile

import pytest
import torch
from helpers import FAMILIES, FAMILY, FINAL, FIRST_BLOCK, STOCK_NORM, TABLES, build, examples, shake, tokens
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, MistralConfig

from hf_ibnorm import (
    NORMS,
    IBNormLlamaForCausalLM,
    IBNormLlamaForSequenceClassification,
    norm_sites,
)

pytestmark = pytest.mark.oldest


def kinds(model):
    return [f"{type(norm).__name__} {getattr(norm, 'variant', '')}".strip() for norm in norm_sites(model).values()]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_override_that_matches_wins(tiny_config, family):
    config = tiny_config(
        family,
        norm_type="ibnorm_s",
        norm_overrides=[
            ["*", "layernorm"],
            [FIRST_BLOCK[family], "ibnorm_l"],
            [f"*.0.{TABLES[family].in_block[1]}", {"type": "dyt", "kwargs": {}}],
        ],
    )
    assert kinds(build(config)) == ["IBNorm L", "DynamicTanh", "LayerNorm", "LayerNorm", "LayerNorm"]


@pytest.mark.parametrize("family", FAMILIES)
def test_overrides_are_saved_resolved_and_load_to_the_bit(tiny_config, family, tmp_path):
    overrides = {FINAL[family]: {"type": "LayerNormalNorm", "kwargs": {"noise": 0}}, FIRST_BLOCK[family]: "IBNorm-T"}
    model = shake(build(tiny_config(family, norm_kwargs={"lam": 3}, norm_overrides=overrides)))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["norm_kwargs"]["lam"] == 3.0
    assert [[glob, norm["type"]] for glob, norm in saved["norm_overrides"]] == [
        [FINAL[family], "layernormalnorm"],
        [FIRST_BLOCK[family], "ibnorm_t"],
    ]
    for _, norm in saved["norm_overrides"]:
        assert set(norm["kwargs"]) == set(NORMS[norm["type"]].defaults)
        assert None not in (norm["kwargs"].get("eps"), norm["kwargs"].get("lam", 0))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert kinds(loaded) == kinds(model)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_an_override_inherits_nothing_but_the_models_eps(tiny_config):
    config = tiny_config(
        "llama", norm_type="ibnorm_l", norm_kwargs={"lam": 9.0, "unit": "mean_abs"}, rms_norm_eps=1e-4,
        norm_overrides={"norm": "ibnorm_l"},
    )  # fmt: skip
    ((_, norm),) = config.norm_overrides
    assert (norm["kwargs"]["lam"], norm["kwargs"]["unit"], norm["kwargs"]["eps"]) == (4.0, "raw", 1e-4)


def test_a_later_change_of_a_default_does_not_change_an_old_checkpoint(tiny_config, tmp_path, monkeypatch):
    model = shake(build(tiny_config("llama", norm_overrides={"norm": "ibnorm_t"})))
    model.save_pretrained(tmp_path)
    for name in ("ibnorm_l", "ibnorm_t"):
        monkeypatch.setitem(NORMS[name].defaults, "lam", 1.25)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([["layers.9.*", "dyt"]], r"norm_overrides\['layers.9.\*'\]: matches no site; sites are .*\(N from 0 to 1\)"),
        ([["*", "dty"]], r"norm_overrides\['\*'\].type: unknown norm 'dty' \(did you mean 'dyt'"),
        ([["*", {"type": "dyt", "kwargs": {"lam": 1}}]], r"norm_overrides\['\*'\].kwargs.lam: dyt has no such option"),
        ([["*", {"type": "ibnorm_s", "kwargs": {"lam": 0.5}}]], r"norm_overrides\['\*'\].kwargs.lam: got 0.5"),
        ([["*", {"type": "dyt", "kwargs": 3}]], r"norm_overrides\['\*'\].kwargs: got 3, must be a dict"),
        ([["*", {"norm": "dyt"}]], r"norm_overrides\['\*'\]: got .*, must be a norm name or"),
        ([["*", 3]], "must be a norm name or"),
        (["*"], r"norm_overrides: got '\*', must be \[glob, norm"),
        ([[3, "dyt"]], r"must be \[glob, norm"),
        ("dyt", "norm_overrides"),
        (7, "norm_overrides"),
    ],
)
def test_bad_overrides_are_errors_that_name_them(tiny_config, family, overrides, message):
    with pytest.raises((ValueError, TypeError, StrictDataclassError), match=message):
        tiny_config(family, norm_overrides=overrides)


def test_an_override_for_a_block_taken_away_later_is_an_error(tiny_config, tmp_path):
    config = tiny_config("llama", norm_overrides={"layers.1.*": "dyt"})
    config.num_hidden_layers = 1
    with pytest.raises(ValueError, match="matches no site"):
        build(config)
    with pytest.raises(StrictDataclassError, match="matches no site"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_with_another_norm_takes_its_defaults(tiny_config, family, tmp_path):
    model = shake(build(tiny_config(family, norm_type="ibnorm_t", norm_kwargs={"lam": 0.3, "standardize": "rms"})))
    model.save_pretrained(tmp_path)
    for load in (FAMILY[family].causal_lm.from_pretrained, AutoModelForCausalLM.from_pretrained):
        assert load(tmp_path, norm_type="IBNorm-T").config.norm_kwargs["lam"] == 0.3
        other = load(tmp_path, norm_type="layernormalnorm", norm_overrides={FINAL[family]: "dyt"})
        assert other.config.norm_kwargs["noise"] == 1.0
        assert kinds(other) == ["LayerNormalNorm"] * 4 + ["DynamicTanh"]
        changed = load(tmp_path, norm_kwargs={"lam": 7}).config
        assert changed.norm_kwargs == {**model.config.norm_kwargs, "lam": 7.0}
        changed.save_pretrained(tmp_path / "changed")
        assert "given" not in (tmp_path / "changed" / "config.json").read_text()
        with pytest.raises(ValueError, match=r"norm_typ: no such config field|lam: got 7 as a config field"):
            load(tmp_path, **{"norm_typ": "dyt"} if load == AutoModelForCausalLM.from_pretrained else {"lam": 7})
        with pytest.raises(ValueError, match="pass norm_kwargs={'eps'"):
            load(tmp_path, **{model.config.norm_eps_field: 1e-3})
    assert AutoConfig.from_pretrained(tmp_path, norm_type="dyt").norm_kwargs["init_alpha"] == 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_checkpoint_without_an_explicit_norm_is_refused(stock_model, family, tmp_path):
    stock_model(family).save_pretrained(tmp_path)
    for load in (FAMILY[family].causal_lm.from_pretrained, FAMILY[family].config.from_pretrained):
        with pytest.raises(ValueError, match=rf"stock '{family}' model; say which norm .* norm_type='ibnorm_l'"):
            load(tmp_path)
    with pytest.raises(ValueError, match="say which norm"):
        FAMILY[family].config.from_dict(json.loads((tmp_path / "config.json").read_text()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NORMS)
def test_a_stock_checkpoint_keeps_weights_and_gains(stock_model, family, name, tmp_path, transformers_log):
    stock = stock_model(family)
    stock.save_pretrained(tmp_path)
    model, info = FAMILY[family].causal_lm.from_pretrained(tmp_path, norm_type=name, output_loading_info=True)
    assert model.config.model_type == f"ibnorm_{family}"
    assert "You are using a model of type" not in transformers_log.text
    ours, theirs = model.state_dict(), stock.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key in theirs)
    assert set(info["missing_keys"]) == {key for key in ours if not key.endswith(".lam")} - set(theirs)
    assert set(info["unexpected_keys"]) == set(theirs) - set(ours)
    for key in info["missing_keys"]:
        last = key.rpartition(".")[2]
        assert re.search(rf"{last} +\| (.\[\d+m)?MISSING", transformers_log.text)
        assert torch.equal(ours[key], torch.full_like(ours[key], 0.5 if key.endswith("alpha") else 0.0))
    if name == STOCK_NORM[family]:
        torch.testing.assert_close(model(tokens()).logits, stock(tokens()).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_checkpoint_takes_its_eps_and_other_fields_from_the_arguments_too(stock_model, family, tmp_path):
    stock_model(family).save_pretrained(tmp_path)
    field = FAMILY[family].config.norm_eps_field
    classifier = FAMILY[family].auto_classes["AutoModelForSequenceClassification"]
    model = classifier.from_pretrained(tmp_path, norm_type="ibnorm_l", num_labels=3, **{field: 1e-3})
    assert model.config.norm_kwargs["eps"] == 1e-3
    assert model.score.out_features == 3


@pytest.mark.parametrize("item", [["norm"], "norm", 3, [1, "dyt"]])
def test_an_override_that_is_no_pair_is_named_in_loading_too(tiny_config, tmp_path, item):
    tiny_config("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"norm_overrides: got .*, must be \[glob, norm name or"):
        AutoConfig.from_pretrained(tmp_path, norm_overrides=[item])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_config_object_is_refused(stock_model, tiny_config, family):
    with pytest.raises(TypeError, match=r"config: got \w+Config, IBNorm\w+ takes one with norms"):
        FAMILY[family].causal_lm(stock_model(family).config)
    config = type(tiny_config(family))(**stock_model(family).config.to_dict())
    assert config.model_type == config.to_dict()["model_type"] == f"ibnorm_{family}"


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    MistralConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type: got a 'mistral' checkpoint, IBNormLlamaConfig takes 'llama'"):
        IBNormLlamaForCausalLM.from_pretrained(tmp_path, norm_type="ibnorm_l")


def test_a_stock_classifier_carries_its_head_over(stock_model, tmp_path):
    from transformers import LlamaForSequenceClassification

    stock = stock_model("llama", LlamaForSequenceClassification, pad_token_id=0)
    stock.save_pretrained(tmp_path)
    model = IBNormLlamaForSequenceClassification.from_pretrained(tmp_path, norm_type="rmsnorm")
    torch.testing.assert_close(model(tokens())[0], stock(tokens())[0])
    model.save_pretrained(tmp_path / "ours")
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")) is type(model)


# Values of which some are allowed for some norms and none for all: half of the configs drawn are invalid.
OPTIONS = {
    "lam": [0, 0.3, 1, 4.0, 1e4, -1.0, float("nan"), "4", True, None],
    "learn_lam": [True, False, 1],
    "unit": ["raw", "mean_abs", "std"],
    "standardize": ["layer", "rms", "none"],
    "order": ["compress_first", "standardize_first"],
    "eps": [1e-6, 0, 1e-3, -1e-6, "1e-6"],
    "elementwise_affine": [True, False, "yes"],
    "bias": [True, False, None],
    "backend": ["auto", "reference", "cuda"],
    "noise": [0.0, 1, 0.5, -1, float("inf")],
    "noise_mode": ["scaled", "unscaled", "dropout", "gauss"],
    "keep_prob": [None, 0.9, 1, 0.0, 1.1],
    "alpha": [1, 0.5, 0.0, 2.0],
    "init_alpha": [0.5, 1, -0.5],
    "lamda": [4.0],
}


@st.composite
def norms(draw):
    name = draw(st.sampled_from([*NORMS, "IBNorm-L", "ibnorm", 3]))
    own = [option for option in OPTIONS if option in getattr(NORMS.get(name), "defaults", OPTIONS)]
    names = draw(st.lists(st.sampled_from(own) if own else st.nothing(), unique=True, max_size=3))
    if draw(st.integers(0, 9)) == 0:
        names = [*names, draw(st.sampled_from([*OPTIONS]))]
    # The first values of each list are allowed more often than not.
    return name, {key: draw(st.sampled_from(OPTIONS[key]) | st.sampled_from(OPTIONS[key][:2])) for key in names}


@st.composite
def fields(draw, family):
    name, kwargs = draw(norms())
    sites = [FINAL[family], FIRST_BLOCK[family], "*", "*.1.*"] + (["*.7.*"] if draw(st.integers(0, 5)) == 0 else [])
    overrides = []
    for glob in draw(st.lists(st.sampled_from(sites), max_size=2)):
        other, options = draw(norms())
        overrides.append([glob, draw(st.sampled_from([other, {"type": other, "kwargs": options}]))])
    return {
        "norm_type": name,
        "norm_kwargs": draw(st.sampled_from([kwargs, kwargs, None])),
        "norm_overrides": draw(st.sampled_from([overrides, overrides, None])),
        "tie_word_embeddings": draw(st.booleans()),
        **({"stray": 1, "norm_stray": 1} if draw(st.integers(0, 19)) == 0 else {}),
    }


@pytest.mark.random
@pytest.mark.parametrize("family", FAMILIES)
def test_random_configs_build_save_load_and_agree_or_fail_with_one_clear_message(tiny_config, family):
    built, refused = [], []

    @settings(examples(250), suppress_health_check=[*HealthCheck])
    @given(fields(family))
    def check(drawn):
        try:
            config = tiny_config(family, num_hidden_layers=2, **drawn)
        except (ValueError, TypeError, StrictDataclassError) as error:
            refused.append(str(error))
            return
        built.append(config)
        model = shake(build(config))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert [loaded.config.norm_type, loaded.config.norm_kwargs, loaded.config.norm_overrides] == [
            config.norm_type,
            config.norm_kwargs,
            config.norm_overrides,
        ]
        for name, kwargs in [
            (config.norm_type, config.norm_kwargs),
            *map(dict.values, dict(config.norm_overrides).values()),
        ]:
            assert [key for key, value in kwargs.items() if value is None] in ([], ["keep_prob"]), name
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)

    check()
    assert min(len(built), len(refused)) > 60 / 250 * (len(built) + len(refused))
    assert all("norm_" in message and len(message) < 700 for message in refused)
