"""Statistics of what goes through the norms of a model: against NumPy on the same rows, and in training."""

import json

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import FAMILIES, STOCK_NORM, build, tokens
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_ibnorm import build_norm, norm_sites
from hf_ibnorm.analysis import ModelStatistics, SiteStatistics, watch
from hf_ibnorm.analysis.sites import QUANTILES
from hf_ibnorm.functional import compress, newton_lambda, power_transform, slope
from hf_ibnorm.sites import contract

NORMS = {
    "ibnorm_s": {},
    "ibnorm_l": {},
    "ibnorm_t": {"unit": "mean_abs", "standardize": "rms"},
    "ibnorm_shrink": {"order": "standardize_first"},
    "layernormalnorm": {},
    "layernorm": {},
    "rmsnorm": {},
    "dyt": {},
}


def many_tokens(rows=10):
    return torch.randint(1, 61, (rows, 16), generator=torch.Generator().manual_seed(0))


def rows_of(count=200, width=16, seed=0):
    """Skewed rows, each of its own scale and mean."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, dtype=torch.float64, generator=generator).exp()
    return x * torch.rand(count, 1, dtype=torch.float64, generator=generator) + 0.3


def measured(norm, x, **options):
    statistics = SiteStatistics(norm, **options)
    for chunk in x.split([1, 50, len(x) - 51]):
        statistics.update(chunk[None])
    return statistics.result()


def by_numpy(x):
    """The cells of one place, each by its definition, from all rows (R, N) at once."""
    root, size = np.sqrt(x.shape[1]), np.abs(x)
    lower_median = np.sort(size, 1)[:, (x.shape[1] - 1) // 2]
    massive = size.max(1) / lower_median
    shares = np.linalg.eigvalsh(np.cov(x.T)).clip(1e-300)
    shares /= shares.sum()
    return {
        "mean": x.mean(),
        "variance": x.var(),
        "skewness": scipy.stats.skew(x, axis=None),
        "excess_kurtosis": scipy.stats.kurtosis(x, axis=None),
        "channel_skewness": np.sort(scipy.stats.skew(x))[(x.shape[1] - 1) // 2],
        "channel_excess_kurtosis": np.sort(scipy.stats.kurtosis(x))[(x.shape[1] - 1) // 2],
        "near_zero": (size < 0.1 * size.mean(1, keepdims=True)).mean(),
        "hoyer": ((root - size.sum(1) / np.linalg.norm(x, axis=1)) / (root - 1)).mean(),
        "massive": massive.mean(),
        "massive_most": massive.max(),
        "row_skewness": scipy.stats.skew(x, axis=1).mean(),
        "row_excess_kurtosis": scipy.stats.kurtosis(x, axis=1).mean(),
        "effective_rank": np.exp(-(shares * np.log(shares)).sum()),
    }


def assert_cells(found, expected):
    for cell, value in expected.items():
        assert found[cell] == pytest.approx(value, rel=1e-4, abs=1e-6), cell


@pytest.mark.parametrize("name", NORMS)
def test_cells_before_and_after_are_those_of_numpy(name):
    norm, x = build_norm(name, 16, **NORMS[name]), rows_of()
    site = measured(norm, x)
    assert (site["rows"], site["skipped"], site["width"]) == (200, 0, 16)
    z = contract(norm).core(x).detach()
    for place, rows in (("before", x.numpy()), ("after", z.numpy())):
        assert_cells(site[place], by_numpy(rows))
        expected = np.quantile(rows, QUANTILES, method="inverted_cdf")
        np.testing.assert_allclose([*site[place]["quantiles"].values()], expected, rtol=0.0101, atol=1e-12)
    json.dumps(site, allow_nan=False)


@pytest.mark.parametrize("name", NORMS)
def test_what_comes_out_is_taken_before_gain_and_bias_and_noise(name):
    norm, x = build_norm(name, 16, **NORMS[name]).double(), rows_of()
    plain = norm.eval()(x)
    with torch.no_grad():
        for parameter in (norm.weight, getattr(norm, "bias", None)):
            if parameter is not None:
                parameter.uniform_(-3, 3)
    torch.testing.assert_close(contract(norm.train()).core(x), plain, rtol=1e-5, atol=1e-6)


def test_a_norm_that_is_not_known_is_refused():
    with pytest.raises(TypeError, match="norm: got BatchNorm1d, must be"):
        contract(nn.BatchNorm1d(4)).core(torch.zeros(2, 4))


@pytest.mark.parametrize("name", [name for name in NORMS if name.startswith("ibnorm")])
def test_contraction_saturation_and_slope(name):
    norm, x = build_norm(name, 16, **NORMS[name]), rows_of()
    site = measured(norm, x)
    if norm.order == "standardize_first":
        x = nn.functional.layer_norm(x, (16,), eps=norm.eps)
    c = x - x.mean(-1, keepdim=True)
    s = compress(c, variant=norm.variant, lam=norm.lam, unit=norm.unit)
    t = c / c.abs().mean(-1, keepdim=True) if norm.unit == "mean_abs" else c
    lam = norm.lam_value
    slopes = {
        "S": torch.ones_like(t) / lam,
        "L": 1 / (1 + lam * t.abs()),
        "T": torch.cosh(lam * t) ** -2,
        "shrink": (t.abs() > lam * t.abs().mean(-1, keepdim=True)).double(),
    }[norm.variant]
    assert_cells(
        site,
        {
            "contraction": (s.numpy().var(1) / x.numpy().var(1)).mean(),
            "saturation": (slopes < 0.1).double().mean().item(),
            "slope": slopes.mean().item(),
        },
    )
    assert site["lam_hat"] is site["p_std"] is None
    assert site["reasons"]["lam_hat"] == "only a LayerNormalNorm has one"


@pytest.mark.parametrize(("variant", "lam"), [("S", 4.0), ("L", 0.0), ("L", 3.0), ("T", 2.0)])
def test_the_slope_is_the_derivative_of_the_compression(variant, lam):
    c = torch.linspace(-2, 2, 33, dtype=torch.float64, requires_grad=True)  # 0 among them
    (derivative,) = torch.autograd.grad(compress(c, variant=variant, lam=lam).sum(), c)
    torch.testing.assert_close(slope(c.detach(), variant=variant, lam=lam), derivative)


def test_lam_hat_and_the_spread_after_the_power_transform():
    norm, x = build_norm("layernormalnorm", 16), rows_of()
    x[0, 0] = 1e4  # a massive activation pushes λ̂ far below 0
    site = measured(norm, x)
    h = nn.functional.layer_norm(x, (16,), eps=1e-5)
    lam = newton_lambda(h)[:, 0].numpy()
    spread = power_transform(h, newton_lambda(h)).numpy().std(1)
    assert_cells(site["lam_hat"], {"mean": lam.mean(), "least": lam.min(), "most": lam.max()})
    assert_cells(site["lam_hat"], {"outside": ((lam < 0) | (lam > 2)).mean()})
    assert_cells(site["p_std"], {"mean": spread.mean(), "least": spread.min(), "most": spread.max()})
    assert site["lam_hat"]["counts"] == np.histogram(lam, site["lam_hat"]["edges"])[0].tolist()
    assert 0 < site["lam_hat"]["outside"] < 1
    assert site["contraction"] is None
    assert site["reasons"]["contraction"] == "only an IBNorm has one"


def test_cells_without_enough_to_go_on_are_empty_and_say_why():
    norm = build_norm("ibnorm_l", 16)
    never, few, some = SiteStatistics(norm), SiteStatistics(norm), SiteStatistics(norm)
    few.update(rows_of(29))
    some.update(rows_of(63))
    assert never.result()["reasons"]["before"] == "the norm has not run"
    assert few.result()["after"] is None
    assert few.result()["reasons"]["after"] == "29 rows; needs 30"
    assert some.result()["before"]["effective_rank"] is None
    assert some.result()["reasons"]["before.effective_rank"] == "63 rows; needs 64, 4 for each channel"
    assert some.result()["before"]["variance"] is not None
    wide = SiteStatistics(build_norm("rmsnorm", 1025))
    wide.update(torch.randn(40, 1025))
    assert wide.result()["reasons"]["before.effective_rank"] == "width 1025; measured up to 1024"


@pytest.mark.parametrize("name", NORMS)
def test_constant_rows_and_width_1_leave_cells_empty(name):
    for width in (1, 16):
        site = SiteStatistics(build_norm(name, width, **NORMS[name]))
        site.update(torch.full((100, width), 2.0))
        result = site.result()
        assert result["before"]["mean"] == 2
        assert result["before"]["variance"] == 0
        for cell in ("skewness", "row_excess_kurtosis", "effective_rank"):
            assert result["before"][cell] is None
            assert result["reasons"][f"before.{cell}"]
        json.dumps(result, allow_nan=False)


def test_rows_that_are_not_finite_are_counted_and_spoil_nothing():
    norm, x = build_norm("layernormalnorm", 16), rows_of()
    spoiled = torch.cat([x, x[:2]])
    spoiled[200, 3], spoiled[201, 5] = torch.nan, torch.inf
    clean, found = measured(norm, x), measured(norm, spoiled)
    assert found.pop("skipped") == 2
    assert clean.pop("skipped") == 0
    for part in ("before", "after", "lam_hat"):
        assert_cells(found[part], {k: v for k, v in clean[part].items() if isinstance(v, float)})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm", [None, "ibnorm_t", "layernormalnorm"])
def test_every_site_of_a_model_is_measured(tiny_config, stock_model, family, norm):
    model = stock_model(family) if norm is None else build(tiny_config(family, norm_type=norm)).eval()
    inputs = {}
    handles = [
        module.register_forward_hook(lambda m, args, out, site=site: inputs.setdefault(site, []).append(args[0]))
        for site, module in norm_sites(model).items()
    ]
    with watch(model, sample=20) as statistics, torch.inference_mode():
        model(many_tokens()[:3])
        model(many_tokens()[3:])
    for handle in handles:
        handle.remove()
    assert not any(module._forward_hooks for module in norm_sites(model).values())
    result = statistics.result()
    assert list(result) == list(norm_sites(model))
    for site, cells in result.items():
        x = torch.cat([each.reshape(-1, 32) for each in inputs[site]]).double()
        z = contract(norm_sites(model)[site]).core(x).detach()
        assert cells["rows"] == len(x) == 160
        assert_cells(cells["before"], by_numpy(x.numpy()))
        assert_cells(cells["after"], by_numpy(z.numpy()))
        sample = statistics.sites[site].before.sample.rows()
        assert len(sample) == 20
        assert all((x.float() == row).all(-1).any() for row in sample)
    expected = "LlamaRMSNorm" if STOCK_NORM[family] == "rmsnorm" else "LayerNorm"
    assert {cells["norm"] for cells in result.values()} == (
        {expected} if norm is None else {"IBNorm" if norm == "ibnorm_t" else "LayerNormalNorm"}
    )


def test_a_model_without_known_sites_is_refused():
    with pytest.raises(ValueError, match="model: got Linear, which runs no known norm"), watch(nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_goes_on_as_if_nothing_were_there_and_checkpointed_blocks_count_once(
    tiny_config, family, use_reentrant
):
    def train(model, watched):
        model.train()
        torch.manual_seed(3)
        for _ in range(2):
            model(tokens(), labels=tokens()).loss.backward()
        return [parameter.grad for parameter in model.parameters()], torch.rand(1), watched

    models = [build(tiny_config(family, norm_type="layernormalnorm")) for _ in range(2)]
    for model in models:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant, "preserve_rng_state": True})
    with watch(models[0]) as statistics:
        found = train(models[0], statistics)
    expected = train(models[1], None)
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    assert torch.equal(found[1], expected[1])
    assert {cells["rows"] for cells in statistics.result().values()} == {2 * 2 * 16}
    states = [each for site in statistics.sites.values() for each in (site.before, site.after)]
    assert not any(state.moments.mean.requires_grad for state in states)


def test_a_model_is_watched_again_after_inference_mode_and_under_autocast(tiny_config):
    model = build(tiny_config("llama", norm_type="ibnorm_l")).eval()
    statistics = ModelStatistics(model)
    with watch(model, statistics), torch.inference_mode():
        model(many_tokens())
    with torch.autocast("cpu", torch.bfloat16), watch(model, statistics):
        model(many_tokens())
    model(many_tokens())  # not watched
    whole, first = statistics.result(), ModelStatistics(model)
    assert {cells["rows"] for cells in whole.values()} == {320}
    with watch(model, first), torch.no_grad():
        model(many_tokens())
    second = ModelStatistics(model)
    with watch(model, second), torch.autocast("cpu", torch.bfloat16):
        model(many_tokens())
    first.merge(second)
    for site, cells in first.result().items():
        assert_cells(cells["before"], {k: v for k, v in whole[site]["before"].items() if isinstance(v, float)})
    other = build(tiny_config("llama", norm_type="ibnorm_l"))
    with pytest.raises(ValueError, match="statistics: made for other norms than"), watch(other, statistics):
        pass


def test_at_most_so_many_rows_a_call():
    site = SiteStatistics(build_norm("ibnorm_l", 16), rows=64)
    site.update(rows_of(200))
    site.update(rows_of(10))
    assert site.result()["rows"] == 50 + 10  # every fourth


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("rank_width", [0, 16])
def test_what_was_packed_in_another_process_is_merged_as_if_measured_here(name, rank_width):
    whole, here, there, alone = (SiteStatistics(build_norm(name, 16), rank_width=rank_width) for _ in range(4))
    x, fewer = rows_of(200), rows_of(60, seed=1)
    whole.update(x)
    here.update(x)
    there.update(fewer)
    whole.merge(there)
    here.merge(here.unpacked(there.packed()))
    assert here.result() == whole.result()
    assert there.result()["rows"] == 60
    assert (here.result()["after"]["effective_rank"] is None) == (rank_width == 0)
    assert alone.packed() is None


def test_memory_is_flat_and_no_value_is_looked_at(monkeypatch):
    def sizes(statistics):
        found, todo = {}, [("", statistics)]
        while todo:
            name, each = todo.pop()
            if isinstance(each, torch.Tensor):
                found[name] = each.shape
            elif hasattr(each, "__dict__") and not isinstance(each, nn.Module):
                todo += [(f"{name}.{key}", value) for key, value in vars(each).items()]
        return found

    def look(*_):
        raise AssertionError("a value was looked at: on a GPU that waits for it")

    sites = [SiteStatistics(build_norm(name, 16, **NORMS[name]), sample=32) for name in NORMS]
    for site in sites:
        site.update(rows_of(3).float())
    before = [sizes(site) for site in sites]
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, look)
    for site in sites:
        for count in (1, 70, 200):
            site.update(rows_of(count).bfloat16())
    monkeypatch.undo()
    assert [sizes(site) for site in sites] == before
    with FakeTensorMode():  # nor in C++: fake tensors have no values
        for name in NORMS:
            site = SiteStatistics(build_norm(name, 16, **NORMS[name]), sample=32)
            site.update(torch.empty(40, 16))
            site.merge(site)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", NORMS)
def test_no_step_waits_for_a_gpu(name):
    site, x = SiteStatistics(build_norm(name, 16, **NORMS[name], device="cuda"), sample=32), rows_of().cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        site.update(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = measured(build_norm(name, 16, **NORMS[name]), rows_of())
    assert_cells(site.result()["after"], {k: v for k, v in on_cpu["after"].items() if isinstance(v, float)})
