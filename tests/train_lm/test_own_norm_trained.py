"""A norm of a user's own in a training: its own option is ramped, and a stopped run goes on."""

import pytest
from training import metrics, run, run_stopped, small_corpus
from transformers import AutoConfig, AutoModelForCausalLM

from hf_ibnorm import NORMS, norm_sites, register_norm

pytestmark = pytest.mark.usefixtures(small_corpus.__name__)


@pytest.fixture(autouse=True)
def tempered():
    import own_norm  # not above: it registers its norm, for every test of this process

    register_norm("tempered", own_norm.Tempered)
    yield
    del NORMS["tempered"]


def test_its_own_option_is_ramped_and_goes_on_where_a_run_was_stopped(tmp_path):
    flags = ["--model.norm_type", "tempered", "--lam_schedule", "linear", "--lam_warmup_steps", "4", "--max_steps", "6"]
    run(tmp_path / "whole", *flags)
    run_stopped(2, tmp_path / "cut", *flags)
    step = max((tmp_path / "cut/checkpoints").glob("step-*"), key=lambda each: int(each.name[5:]))
    between = AutoConfig.from_pretrained(step / "model").norm_kwargs["temper"]
    assert 1.0 < between < 1.5
    run(tmp_path / "cut", *flags, "--resume", "auto")
    assert [row["loss"] for row in metrics(tmp_path / "cut")] == [row["loss"] for row in metrics(tmp_path / "whole")]
    for folder in ("whole", "cut"):
        final = AutoModelForCausalLM.from_pretrained(tmp_path / folder / "final")
        assert {norm.ramped for norm in norm_sites(final).values()} == {final.config.norm_kwargs["temper"]} == {1.5}
