"""Pictures of a study: what is far off is named at the edge, and norms are told apart however many they are."""

import pytest

from eval.study.figures import Curve, draw_cost, draw_losses
from eval.study.plan import Arm
from eval.study.results import BASELINE, Group
from eval.study.training import TRAINED, Training
from hf_ibnorm.report.plots import COLOURS
from hf_ibnorm.report.runs import Run


def curves(name, end, seeds=(0, 1, 2)):
    steps = range(20, 401, 20)
    return [
        Curve("", name, seed, [(i, end + 0.01 * seed + 40 / i) for i in steps], [(i, end + 9 / i) for i in (200, 400)])
        for seed in seeds
    ]


def group(name, value, seconds=100.0, kwargs=None, norm="rmsnorm"):
    metrics = [{"step": 1, "tokens": 100, "tokens_per_second": 100 / seconds, "loss": 1.0, "eval_loss": value}]
    finals = {seed: Training(TRAINED, Run(name, {}, {}, metrics, None)) for seed in (0, 1)}
    return Group("", Arm(name, norm, kwargs or {}), {}, None, finals)


def notes(axes):
    return [text.get_text() for text in axes.texts]


def test_a_norm_that_learns_nothing_does_not_take_the_losses(figures, tmp_path):
    near = [each for i, name in enumerate(("rmsnorm", "b", "c", "d")) for each in curves(name, 4.4 + 0.02 * i)]
    draw_losses([*near, *curves("dyt", 6.3)], "rmsnorm", tmp_path / "losses.png")
    training, validation = figures[0].axes
    assert training.get_ylim()[1] < 5
    assert validation.get_ylim()[1] < 0.2
    assert notes(validation) == ["dyt is off the scale: 1.9"]
    assert validation.get_title(loc="left") == "validation loss, difference from rmsnorm, nats per token"
    assert training.get_title(loc="left") != validation.get_title(loc="left")


@pytest.mark.parametrize("baseline", [None, "another", "a"])
def test_without_a_baseline_of_the_same_steps_losses_are_shown_as_they_are(figures, tmp_path, baseline):
    shorter = [Curve("", "b", 0, [(20, 5.0)], [(200, 4.5)])]
    draw_losses([*curves("a", 4.4, [0]), *shorter], baseline, tmp_path / "losses.png")
    validation = figures[0].axes[1]
    assert validation.get_title(loc="left") == "validation loss, nats per token"
    assert validation.lines[0].get_ydata().tolist() == [4.4 + 9 / 200, 4.4 + 9 / 400]


def test_the_norms_of_a_sweep_share_a_colour_and_have_lam_beside_them(figures, tmp_path):
    sweep = [group(f"ibnorm_t lam={lam}", 2 + lam / 100, 90 + lam, {"lam": lam}, "ibnorm_t") for lam in (1, 2, 4)]
    far = group("dyt", 9.0)
    draw_cost([group("rmsnorm", 2.0), *sweep, far], tmp_path / "cost.png", "eval_loss", "loss")
    (axes,) = figures[0].axes
    legend = axes.get_legend()
    assert sorted(text.get_text() for text in legend.texts) == ["dyt", "ibnorm_t", "rmsnorm"]
    assert legend.get_title().get_text() == "numbers in the picture: λ"
    assert notes(axes) == ["", "1", "2", "4", "dyt: 9, off the scale"]
    assert axes.get_ylim()[1] < 2.2


def test_more_norms_than_colours_have_their_names_beside_them(figures, tmp_path):
    groups = [group(f"norm {i}", 2 + i / 100, 90 + 7 * i) for i in range(len(COLOURS) + 2)]
    groups[0].verdict = BASELINE
    draw_cost(groups, tmp_path / "cost.png", "eval_loss", "loss")
    (axes,) = figures[0].axes
    named = [text.get_text() for text in axes.get_legend().texts]
    assert named == [*(f"norm {i}" for i in range(len(COLOURS) - 1)), "others"]
    assert notes(axes)[len(COLOURS) - 1 :] == ["norm 9", "norm 10", "norm 11"]
