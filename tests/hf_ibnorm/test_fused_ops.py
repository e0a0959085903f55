"""The fused ops in torch, and what is left to the formulas."""

import copy
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from helpers import build, tokens
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hf_ibnorm import IBNorm, LayerNormalNorm, functional, kernels
from hf_ibnorm.kernels import ops
from hf_ibnorm.kernels.cpu.build import folder

N = 24
FORMS = {
    "ib_norm": partial(IBNorm, variant="L", unit="mean_abs"),
    "rms": partial(IBNorm, variant="T", standardize="rms", order="standardize_first"),
    "normal_norm": partial(LayerNormalNorm, noise=0.0),
    "noisy": partial(LayerNormalNorm, noise=0.7),
}
KERNELS = folder()
"""Where the kernels really are."""
QUIET = ("ib_norm", "rms", "normal_norm")


@pytest.fixture(autouse=True)
def _built(request):
    if "no_kernels" not in request.fixturenames and (reason := kernels.lacking("cpu")):
        pytest.skip(f"no CPU kernels: {reason}")


@pytest.fixture
def no_kernels(monkeypatch, tmp_path):
    """Kernels that were never built; to look for them anew is to warn anew."""
    with monkeypatch.context() as patch:
        patch.setenv("HF_IBNORM_KERNELS", str(tmp_path))
        kernels.forget()
        yield
    kernels.forget()


@pytest.fixture
def only_formulas(monkeypatch):
    """Make it an error to run fused."""

    def refuse(*_):
        raise AssertionError("a fused norm ran")

    monkeypatch.setattr(ops, "run", refuse)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shaken(norm, seed=1):
    """`norm` with parameters that are not its initial ones."""
    with torch.no_grad():
        for i, parameter in enumerate(norm.parameters()):
            parameter.add_(draw(seed + i, *parameter.shape).to(parameter.dtype))
    return norm


def pair(form, **options):
    """A norm by kernels, and the same by the formulas."""
    return [shaken(FORMS[form](N, backend=backend, **options)) for backend in ("fused", "reference")]


def step(norm, x, upstream, seed=0):
    """y, and the gradients of x and of the norm's parameters."""
    torch.manual_seed(seed)
    leaf = x.detach().requires_grad_()
    y = norm(leaf)
    inputs = [leaf, *(parameter for parameter in norm.parameters() if parameter.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]


def assert_close(actual, expected, tolerance=1e-5):
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


IB_OPTIONS = ("L", "mean_abs", "layer", "compress_first", 1e-6)
SEED, NORMALS = torch.tensor([3]), draw(8, 2, 3, N)


def op_arguments():
    """Argument sets for the two forward ops, those that can need gradients made to."""
    x, weight, bias = draw(0, 2, 3, N), draw(1, N), draw(2, N)
    for each in (x, weight, bias):
        each.requires_grad_()
    lam = torch.tensor(2.0)
    return {
        "ib_norm": (ops.ib_norm, (x, weight, bias, lam, *IB_OPTIONS)),
        "ib_norm without affine": (ops.ib_norm, (x, None, None, lam, "T", "raw", "rms", "standardize_first", 1e-6)),
        "ib_norm of halves": (ops.ib_norm, (x.detach().bfloat16().requires_grad_(), weight, bias, lam, *IB_OPTIONS)),
        "normal_norm": (ops.normal_norm, (x, weight, bias, None, None, 0.0, "none", 1.0, 1e-5)),
        "normal_norm of a seed": (ops.normal_norm, (x, weight, None, SEED, None, 0.7, "dropout", 1.0, 1e-5)),
        "normal_norm of normals": (ops.normal_norm, (x, weight, bias, None, NORMALS, 0.7, "scaled", 0.5, 1e-5)),
    }


@pytest.mark.parametrize("case", op_arguments())
def test_forward_ops_are_what_torch_asks_of_ops(case):
    op, arguments = op_arguments()[case]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("needs", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("case", ["ib_norm", "normal_norm of a seed"])
def test_backward_ops_are_what_torch_asks_of_ops(case, needs):
    op, arguments = op_arguments()[case]
    x, weight, bias, *options = (each.detach() if isinstance(each, torch.Tensor) else each for each in arguments)
    backward = ops.ib_norm_backward if op is ops.ib_norm else ops.normal_norm_backward
    _, stats = op(x, weight, bias, *options)
    torch.library.opcheck(backward, (draw(5, *x.shape), x, stats, weight, *needs, *options))


def with_argument(arguments, place, value):
    return (*arguments[:place], value, *arguments[place + 1 :])


@pytest.mark.parametrize(
    ("name", "case", "place", "value"),
    [
        ("x", "ib_norm", 0, torch.tensor(1.0)),
        ("x", "ib_norm", 0, torch.empty(3, 0)),
        ("x", "ib_norm", 0, draw(0, 2, 3, N).double()),
        ("weight", "ib_norm", 1, draw(0, N - 1)),
        ("weight", "ib_norm", 1, draw(0, 1)),
        ("bias", "ib_norm", 2, draw(0, N + 1)),
        ("bias", "ib_norm", 2, draw(0, 1, N)),
        ("lam", "ib_norm", 3, torch.tensor([1.0])),
        ("lam", "ib_norm", 3, torch.tensor(1.0, dtype=torch.float64)),
        ("weight", "normal_norm of a seed", 1, draw(0, N - 1)),
        ("seed", "normal_norm of a seed", 3, torch.empty(0, dtype=torch.int64)),
        ("seed", "normal_norm of a seed", 3, torch.tensor([3], dtype=torch.int32)),
        ("normals", "normal_norm of normals", 4, draw(0, 2, 3, N - 1)),
        ("normals", "normal_norm of normals", 4, NORMALS.bfloat16()),
    ],
)
def test_a_forward_op_refuses_tensors_it_would_read_beyond(name, case, place, value):
    op, arguments = op_arguments()[case]
    with pytest.raises(ValueError, match=f"^{name}: got"):
        op(*with_argument(arguments, place, value))


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("grad", 0, draw(0, 2, 2, N)),
        ("grad", 0, draw(0, 2, 3, N).double()),
        ("x", 1, torch.empty(2, 3, 0)),
        ("stats", 2, torch.empty(5, 4)),
        ("stats", 2, torch.empty(6, 3)),
        ("stats", 2, torch.empty(6, 4, dtype=torch.float16)),
        ("weight", 3, draw(0, N - 1)),
    ],
)
@pytest.mark.parametrize("case", ["ib_norm", "normal_norm"])
def test_a_backward_op_refuses_tensors_it_would_read_beyond(case, name, place, value):
    op, arguments = op_arguments()[case]
    x, weight, _, *options = (each.detach() if isinstance(each, torch.Tensor) else each for each in arguments)
    backward = ops.ib_norm_backward if op is ops.ib_norm else ops.normal_norm_backward
    whole = (draw(5, *x.shape), x, torch.ones(6, 4), weight, True, True, *options)
    backward(*whole)
    with pytest.raises(ValueError, match=f"^{name}: got"):
        backward(*with_argument(whole, place, value))


@pytest.mark.parametrize("library", ["cpu", "triton"])
def test_tensors_of_any_strides_are_read_as_what_they_are(library, monkeypatch):
    if library == "triton":  # in its interpreter
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("there is no interpreter beside a GPU")
        from hf_ibnorm.kernels import triton

        monkeypatch.setitem(ops._LIBRARIES, "cpu", triton)
    for case, (op, (x, weight, bias, *options)) in op_arguments().items():
        given = [each if each is None else each.detach() for each in (x, weight, bias)]
        apart = [each if each is None else torch.stack([each, -each], -1)[..., 0] for each in given]
        options_apart = [
            torch.stack([each, each + 1], -1)[..., 0] if isinstance(each, torch.Tensor) else each for each in options
        ]
        y, stats = op(*given, *options)
        assert torch.equal(op(*apart, *options_apart)[0], y), case
        backward = ops.ib_norm_backward if op is ops.ib_norm else ops.normal_norm_backward
        grad = draw(5, *x.shape).to(x.dtype)
        grad_apart, stats_apart = (torch.stack([each, -each], -1)[..., 0] for each in (grad, stats))
        expected = backward(grad, given[0], stats, given[1], True, True, *options)
        actual = backward(grad_apart, apart[0], stats_apart, apart[1], True, True, *options_apart)
        assert all(map(torch.equal, actual, expected)), case


LAYOUTS = {
    "contiguous": lambda seed: draw(seed, 3, 4, N),
    "one row": lambda seed: draw(seed, N),
    "transposed": lambda seed: draw(seed, 4, 3, N).transpose(0, 1),
    "elements apart": lambda seed: draw(seed, 3, 4, 2 * N)[..., ::2],
    "elements far apart": lambda seed: draw(seed, N, 4, 3).permute(2, 1, 0),
    "rows apart": lambda seed: draw(seed, 3, 4, N + 5)[..., 3 : N + 3],
    "the same row": lambda seed: draw(seed, 4, N).expand(3, 4, N),
    "one element": lambda seed: draw(seed, 1).expand(3, 4, N),
    "no rows": lambda seed: draw(seed, 0, 4, N),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", QUIET)
def test_inputs_and_gradients_of_any_layout_give_what_the_formulas_give(form, layout):
    fused, reference = pair(form)
    x = LAYOUTS[layout](0)
    for upstream in (draw(5, *x.shape), LAYOUTS[layout](6), draw(7, 1).expand(x.shape)):
        found = step(fused, x, upstream)
        assert found[0].shape == x.shape
        # float32 keeps few digits of what is left of rows of equal elements
        assert_close(found, step(reference, x, upstream), 1e-3 if layout == "one element" else 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_one_norm_used_twice_gets_both_gradients(form):
    fused, reference = pair(form)
    if form == "noisy":  # its noise is not the formulas'
        fused.noise = reference.noise = 0.0

    def twice(norm):
        y = norm(norm(x) + x)
        return torch.autograd.grad(y.square().sum(), [x, *norm.parameters()])

    x = draw(0, 5, N).requires_grad_()
    assert_close(twice(fused), twice(reference), 1e-4)


@pytest.mark.parametrize("shape", [(N,), (5, N), (2, 3, N)])
@pytest.mark.parametrize("form", QUIET)
def test_outputs_may_be_changed_in_place(form, shape):
    fused, reference = pair(form)

    gradients = []
    for norm in (fused, reference):
        x = draw(0, *shape).requires_grad_()
        y = nn.ReLU(inplace=True)(norm(x).mul_(2))
        gradients.append(torch.autograd.grad(y.sum(), [x, *norm.parameters()]))
    assert_close(*gradients)


def test_threads_share_a_norm():
    norm, x = pair("ib_norm")[0], draw(0, 5, N)
    expected = step(norm, x, x)
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda _: step(norm, x, x), range(200))
        assert all(all(map(torch.equal, each, expected)) for each in found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_noise(reentrant):
    norm, _ = pair("noisy")
    block = nn.Sequential(nn.Linear(N, N), norm, nn.Linear(N, N), norm)

    def gradients(run):
        torch.manual_seed(3)
        x = draw(0, 5, N).requires_grad_()
        loss = run(x).square().sum()
        block.zero_grad()
        loss.backward()
        return [loss.detach(), x.grad, *(parameter.grad.clone() for parameter in block.parameters())]

    replayed = gradients(lambda x: checkpoint(block, x, use_reentrant=reentrant))
    assert all(map(torch.equal, replayed, gradients(block)))
    forgotten = gradients(lambda x: checkpoint(block, x, use_reentrant=reentrant, preserve_rng_state=False))
    assert not torch.equal(forgotten[1], replayed[1])


@pytest.mark.parametrize("form", QUIET)
def test_autocast_leaves_the_dtypes_as_the_formulas_do(form):
    gradients = []
    for norm in pair(form):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(N, N), norm, nn.Linear(N, N))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = block(draw(0, 5, N))
            assert block[:2](draw(0, 5, N)).dtype == torch.bfloat16
            assert norm(draw(0, 5, N)).dtype == torch.float32
        y.square().sum().backward()
        gradients.append([y.detach(), *(parameter.grad for parameter in block.parameters())])
    for actual, expected in zip(*gradients, strict=True):
        assert actual.dtype == expected.dtype
        assert (actual - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias"), ("x",), ("x", "weight")])
@pytest.mark.parametrize("form", QUIET)
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(form, frozen):
    gradients = []
    for norm in pair(form):
        x = draw(0, 5, N).requires_grad_("x" not in frozen)
        norm.weight.requires_grad_("weight" not in frozen)
        norm.bias.requires_grad_("bias" not in frozen)
        norm(x).square().sum().backward()
        gradients.append({"x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad})
    fused, reference = gradients
    for name, gradient in fused.items():
        assert (gradient is None) == (name in frozen)
        if gradient is not None:
            torch.testing.assert_close(gradient, reference[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("x_dtype", "dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("form", QUIET)
def test_inputs_and_parameters_of_two_dtypes_get_gradients_of_their_own(form, x_dtype, dtype):
    fused, reference = pair(form, dtype=dtype)
    x, upstream = draw(0, 5, N).to(x_dtype), draw(5, 5, N).to(x_dtype)
    found = step(fused, x, upstream)
    assert [each.dtype for each in found] == [x_dtype, x_dtype, dtype, dtype]
    for actual, expected in zip(found, step(reference, x, upstream), strict=True):
        assert (actual - expected).abs().max() <= 2 * torch.finfo(actual.dtype).eps * (1 + expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_backward_keeps_the_input_and_16_bytes_a_row(form, dtype):
    norm, _ = pair(form)
    x = draw(0, 6, 7, N).to(dtype).requires_grad_()
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        norm(x).sum().backward()
    for known in (x, norm.weight, norm.bias):
        kept.pop(known.data_ptr(), None)
    assert 0 < sum(kept.values()) <= 16 * 6 * 7 + 16


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_are_those_of_the_formulas_noise_included(form):
    fused, reference = pair(form)
    x = draw(0, 5, N).requires_grad_()
    torch.manual_seed(11)
    normals = ops.library("cpu").normals(torch.randint(2**62, (1,)), 5, N)

    def formula(x):
        options = (fused.noise, fused.noise_mode, fused.alpha, fused.eps)
        return functional.normal_norm_with(x, fused.weight, fused.bias, normals, *options)

    def second(norm):
        torch.manual_seed(11)
        inputs = [x, fused.weight, fused.bias]
        first = torch.autograd.grad((norm(x) * draw(5, 5, N)).sum(), inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum(each.pow(3).sum() for each in first), inputs, allow_unused=True)]

    if form != "noisy":
        reference.weight, reference.bias = fused.weight, fused.bias
    found, expected = second(fused), second(formula if form == "noisy" else reference)
    assert found[-1] is None  # no gradient depends on the bias
    assert expected[-1] is None
    for actual, wanted in zip(found[:-1], expected[:-1], strict=True):
        assert (actual - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("form", QUIET)
def test_jacobians_and_batches_of_gradients_are_those_of_the_formulas(form):
    fused, reference = pair(form)
    x = draw(0, 2, N)
    jacobian = torch.autograd.functional.jacobian
    assert_close([jacobian(fused, x, vectorize=True)], [jacobian(reference, x)], 1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_auto_is_fused_where_there_are_kernels(form, monkeypatch):
    fused, _ = pair(form)
    auto = shaken(FORMS[form](N))
    x = draw(0, 5, N)
    assert auto.backend == "auto"
    assert all(map(torch.equal, step(auto, x, x), step(fused, x, x)))
    ran = []
    run = ops.run
    monkeypatch.setattr(ops, "run", lambda *arguments: ran.append(type(arguments[-1])) or run(*arguments))
    for norm in (auto, fused):
        norm(x)
    assert ran == [ops.IBNormOptions if form in ("ib_norm", "rms") else ops.NormalNormOptions] * 2


@pytest.mark.parametrize("form", FORMS)
def test_a_dispatch_mode_sees_the_op_and_both_ways_agree_to_the_bit(form):
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.append(str(function))
            return function(*arguments, **(options or {}))

    fused, _ = pair(form)
    x, seen = draw(0, 5, N), []
    direct = step(fused, x, x)
    with Watch():
        watched = step(fused, x, x)
    name = "ib_norm" if form in ("ib_norm", "rms") else "normal_norm"
    assert [each for each in seen if each.startswith("hf_ibnorm")] == [
        f"hf_ibnorm.{name}.default",
        f"hf_ibnorm.{name}_backward.default",
    ]
    assert all(map(torch.equal, direct, watched))


@pytest.mark.parametrize("form", FORMS)
def test_reference_runs_the_formulas_to_the_bit(form, only_formulas):
    _, norm = pair(form)
    x = draw(0, 5, N)
    torch.manual_seed(0)
    if form in ("ib_norm", "rms"):
        options = {"variant": norm.variant, "unit": norm.unit, "standardize": norm.standardize, "order": norm.order}
        expected = functional.ib_norm(x, norm.weight, norm.bias, lam=norm.lam, **options)
    else:
        expected = functional.normal_norm(x, norm.weight, norm.bias, noise=norm.noise, training=True)
    assert torch.equal(step(norm, x, x)[0], expected)


def assert_same_step(form, change=lambda norm: norm, x=None, **options):
    """The fused norm, which must not run fused, and the reference agree to the bit."""
    x = draw(0, 5, N) if x is None else x
    found, expected = (step(change(norm), x, x) for norm in pair(form, **options))
    assert all(map(torch.equal, found, expected))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_float64_is_left_to_the_formulas(form, only_formulas):
    found = assert_same_step(form, nn.Module.double, draw(0, 5, N).double())
    assert found[0].dtype == torch.float64


@pytest.mark.parametrize("variant", ["L", "T", "shrink"])
def test_a_lam_that_learns_is_left_to_the_formulas(variant, only_formulas):
    *_, theta = assert_same_step("ib_norm", variant=variant, lam=0.7, learn_lam=True)
    assert theta.abs() > 0


def test_shrink_is_left_to_the_formulas(only_formulas):
    assert_same_step("ib_norm", variant="shrink", lam=0.5)


@pytest.mark.parametrize("form", QUIET)
def test_transforms_of_functions_are_left_to_the_formulas(form, only_formulas):
    fused, reference = pair(form)
    x, tangent = draw(0, 5, N), draw(5, 5, N)
    for transformed in (
        lambda norm: torch.func.grad(lambda x: norm(x).square().sum())(x),
        lambda norm: torch.func.vmap(norm)(x),
        lambda norm: torch.func.jvp(norm, (x,), (tangent,))[1],
        lambda norm: torch.func.jacrev(norm)(x[0]),
        lambda norm: torch.func.hessian(lambda x: norm(x).pow(3).sum())(x[0]),
    ):
        assert torch.equal(transformed(fused), transformed(reference))


@pytest.mark.parametrize("form", QUIET)
def test_forward_mode_is_left_to_the_formulas(form, only_formulas):
    tangents = []
    for norm in pair(form):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(draw(0, 5, N), draw(5, 5, N))
            tangents.append(torch.autograd.forward_ad.unpack_dual(norm(dual)).tangent)
    assert torch.equal(*tangents)
    assert tangents[0].norm() > 0


@pytest.mark.parametrize("form", QUIET)
def test_an_exported_program_holds_no_op_of_ours(form, only_formulas):
    fused, reference = pair(form)
    program = torch.export.export(fused.eval(), (draw(0, 5, N),))
    assert not any("hf_ibnorm" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(draw(1, 5, N)), reference(draw(1, 5, N)))


def test_a_traced_module_holds_no_op_of_ours(only_formulas):
    fused, reference = pair("ib_norm")
    traced = torch.jit.trace(fused.eval(), draw(0, 5, N), check_trace=False)
    assert "hf_ibnorm::" not in str(traced.inlined_graph)
    assert torch.equal(traced(draw(1, 5, N)), reference(draw(1, 5, N)))


class Marked(torch.Tensor):
    """A subclass that keeps its kind."""


@pytest.mark.parametrize("form", QUIET)
def test_tensor_subclasses_are_left_to_the_formulas(form, only_formulas):
    fused, reference = pair(form)
    y = fused(draw(0, 5, N).as_subclass(Marked))
    assert type(y) is Marked
    assert torch.equal(y.as_subclass(torch.Tensor), reference(draw(0, 5, N)))
    del fused.weight
    fused.weight = reference.weight.detach().as_subclass(Marked)
    assert torch.equal(fused(draw(0, 5, N)).as_subclass(torch.Tensor), reference(draw(0, 5, N)))


@pytest.mark.parametrize("form", FORMS)
def test_of_fake_tensors_the_ops_give_shapes(form, monkeypatch):
    monkeypatch.setattr(functional, "ib_norm", None)
    monkeypatch.setattr(functional, "normal_norm", None)
    with FakeTensorMode():
        norm, x = FORMS[form](N, backend="fused"), torch.empty(2, 3, N, requires_grad=True)
        ys = [norm(x)]
    if form in QUIET:  # a seed that is drawn outside the mode has a value, and torch mixes no such tensors
        ys.append(norm(x))
    for y in ys:
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert isinstance(dx, FakeTensor)
        assert dx.shape == y.shape == x.shape


@pytest.mark.parametrize("form", FORMS)
def test_the_meta_device_gives_shapes(form, only_formulas):
    norm = FORMS[form](N, device="meta", backend="fused")
    y = norm(torch.empty(3, 4, N, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.device.type) == ((3, 4, N), torch.bfloat16, "meta")


@pytest.mark.parametrize("weight", [draw(1, N - 1), draw(1, 1), draw(1, 2, N)])
def test_parameters_of_another_width_fail_as_in_the_formulas(weight, only_formulas):
    for norm, formula in (
        (partial(kernels.ib_norm, lam=2.0), partial(functional.ib_norm, lam=2.0)),
        (kernels.normal_norm, functional.normal_norm),
    ):
        for arguments in ((weight, None), (None, weight)):
            outcomes = []
            for function in (norm, formula):
                try:
                    outcomes.append(function(draw(0, 2, N), *arguments).tolist())
                except RuntimeError as error:
                    outcomes.append(str(error))
            assert outcomes[0] == outcomes[1]


def test_no_width_and_no_dimensions_are_left_to_the_formulas(only_formulas):
    assert kernels.ib_norm(torch.empty(3, 0), lam=2.0).shape == (3, 0)
    assert kernels.normal_norm(torch.empty(3, 0)).shape == (3, 0)
    with pytest.raises(RuntimeError, match="at least 1-dimensional"):
        kernels.ib_norm(torch.tensor(1.0), lam=2.0)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("ib_norm", {"variant": "Q", "lam": 1.0}, "variant: got 'Q'"),
        ("ib_norm", {"unit": "std", "lam": 1.0}, "unit: got 'std'"),
        ("ib_norm", {"standardize": "batch", "lam": 1.0}, "standardize: got 'batch'"),
        ("ib_norm", {"order": "last", "lam": 1.0}, "order: got 'last'"),
        ("ib_norm", {"variant": "S", "lam": 0.5}, "lam: got 0.5"),
        ("ib_norm", {"lam": float("nan")}, "lam: got nan"),
        ("ib_norm", {"lam": 1.0, "eps": -1.0}, "eps: got -1"),
        ("normal_norm", {"noise": -1.0}, "noise: got -1"),
        ("normal_norm", {"noise_mode": "pink"}, "noise_mode: got 'pink'"),
        ("normal_norm", {"noise_mode": "dropout"}, "keep_prob: got None"),
        ("normal_norm", {"alpha": 2.0}, "alpha: got 2"),
        ("normal_norm", {"eps": -1.0}, "eps: got -1"),
    ],
)
def test_bad_options_are_named_as_by_the_formulas(function, options, message):
    for module in (kernels, functional):
        with pytest.raises(ValueError, match=message):
            getattr(module, function)(draw(0, 2, N), **options)


@pytest.mark.parametrize("form", FORMS)
def test_fused_without_kernels_is_an_error_that_says_what_to_run(form, no_kernels):
    norm, _ = pair(form)
    with pytest.raises(RuntimeError, match="'fused'.*not built.*`hf-ibnorm build_kernels`"):
        norm(draw(0, 5, N))
    assert norm.double()(draw(0, 5, N).double()).isfinite().all()  # no kernels compute that anyway


@pytest.mark.parametrize("form", FORMS)
def test_auto_without_kernels_is_the_formulas_and_warns_once(form, no_kernels, caplog):
    _, reference = pair(form)
    auto, x = shaken(FORMS[form](N)), draw(0, 5, N)
    with caplog.at_level(logging.WARNING):
        for norm in (auto, auto, copy.deepcopy(auto)):
            assert all(map(torch.equal, step(norm, x, x), step(reference, x, x)))
    assert len(caplog.records) == 1
    assert "build_kernels" in caplog.text
    assert kernels.describe("cpu").startswith("reference (not built")


def test_only_rank_0_warns(no_kernels, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    IBNorm(N)(draw(0, 5, N))
    assert not caplog.records


def test_kernels_are_found_once_older_answers_are_forgotten(no_kernels, monkeypatch):
    auto, x = IBNorm(N), draw(0, 5, N)
    before = auto(x)
    with monkeypatch.context() as patch:
        patch.setenv("HF_IBNORM_KERNELS", str(KERNELS))
        assert torch.equal(auto(x), before)
        kernels.forget()
        if kernels.lacking("cpu"):
            pytest.skip("they are not built")
        assert kernels.describe("cpu").startswith("fused (C++")
        torch.testing.assert_close(auto(x), before)


def test_a_broken_library_is_a_reason_not_a_crash(no_kernels):
    from hf_ibnorm.kernels.cpu.build import library_path

    library_path().write_bytes(b"\x7fELF but not whole")
    assert "reference" in kernels.describe("cpu")
    assert IBNorm(N)(draw(0, 5, N)).isfinite().all()
    with pytest.raises(RuntimeError, match="'fused'"):
        IBNorm(N, backend="fused")(draw(0, 5, N))


def test_compiled_without_kernels_is_the_formulas(no_kernels):
    auto, x = shaken(IBNorm(N)), draw(0, 5, N)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(auto, fullgraph=True, backend="eager")(x), auto(x))
    torch.compiler.reset()


def test_the_same_seed_gives_the_same_noise_and_another_seed_another():
    norm, _ = pair("noisy")
    x = draw(0, 5, N)
    first, again, other = (step(norm, x, x, seed) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(1)
    assert not torch.equal(norm(x), norm(x))


def test_a_generator_is_where_noise_comes_from():
    x = draw(0, 5, N)

    def noisy(seed):
        generator = torch.Generator().manual_seed(seed)
        return kernels.normal_norm(x, noise=1.0, training=True, generator=generator, backend="fused")

    before = torch.get_rng_state()
    assert torch.equal(noisy(1), noisy(1))
    assert not torch.equal(noisy(1), noisy(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("change", [{}, {"noise_mode": "dropout", "keep_prob": 0.9}, {"noise_mode": "unscaled"}])
def test_eval_draws_nothing_and_training_one_seed(change):
    norm = FORMS["noisy"](N, backend="fused", **change)
    x, before = draw(0, 5, N), torch.get_rng_state()
    norm.eval()(x)
    FORMS["normal_norm"](N, backend="fused")(x)
    assert torch.equal(torch.get_rng_state(), before)
    norm.train()(x)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.randint(2**62, (1,))
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("change", [{}, {"noise_mode": "dropout", "keep_prob": 0.8}, {"noise_mode": "unscaled"}])
def test_noise_has_the_strength_that_the_formulas_give_it(change):
    fused, reference = (LayerNormalNorm(4096, backend=backend, **change) for backend in ("fused", "reference"))
    x = draw(0, 16, 4096)
    torch.manual_seed(0)
    strengths = [(norm.train()(x) - norm.eval()(x)).square().mean().sqrt() for norm in (fused, reference)]
    torch.testing.assert_close(*strengths, rtol=0.02, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_norm_run_as_it_does(form, how, tmp_path):
    norm, x = pair(form)[0], draw(0, 5, N)
    if how == "deepcopy":
        again = copy.deepcopy(norm)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(norm))
    else:
        torch.save(norm, tmp_path / "norm.pt")
        again = torch.load(tmp_path / "norm.pt", weights_only=False)
    assert again is not norm
    assert all(map(torch.equal, step(again, x, x), step(norm, x, x)))


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(N, N), shaken(IBNorm(N)), nn.GELU(), shaken(LayerNormalNorm(N, noise=0.5)))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_is_one_graph_and_computes_the_same_noise_included(backend):
    model, x = small_model(), draw(0, 5, N)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_close(step(compiled, x, x, seed=4), step(model, x, x, seed=4), 1e-4)
    torch.compiler.reset()


def test_changing_lam_of_a_compiled_norm_takes_effect_without_compiling_again():
    norm, x = shaken(IBNorm(N)), draw(0, 5, N)
    torch.compiler.reset()
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    before = step(compiled, x, x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lam in (0.0, 0.5, 7.0):
            norm.set_lam(lam)
            assert_close(step(compiled, x, x), step(norm, x, x))
            assert not torch.allclose(step(compiled, x, x)[0], before[0])
    torch.compiler.reset()


def test_a_compiled_norm_takes_any_number_of_rows():
    norm = shaken(IBNorm(N))
    torch.compiler.reset()
    compiled = torch.compile(norm, fullgraph=True, dynamic=True, backend="aot_eager")
    step(compiled, draw(0, 5, N), draw(1, 5, N))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (7, 9):
            x = draw(0, count, N)
            assert_close(step(compiled, x, x), step(norm, x, x))
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("ibnorm_l", {}), ("ibnorm_t", {"unit": "mean_abs"}), ("layernormalnorm", {"noise": 0.5})]
)
def test_a_compiled_language_model_computes_the_same_noise_included(tiny_config, name, options):
    model = build(tiny_config("llama", norm_type=name, norm_kwargs=options)).train()
    torch.compiler.reset()
    found = []
    for forward in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        torch.manual_seed(5)
        output = forward(input_ids=tokens(), labels=tokens(), use_cache=False)
        output.loss.backward()
        found.append([output.logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    torch.compiler.reset()
    assert_close(*found, 1e-4)
