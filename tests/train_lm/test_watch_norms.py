"""`watch_norms`: what goes into and out of the norms at some steps, without a trace in the training."""

import json
import math
from contextlib import nullcontext

import pytest
import torch
from launching import launch, needs_deepspeed, program
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import result, run, run_on_pages, run_stopped, small_corpus
from transformers import AutoModelForCausalLM

from hf_ibnorm.analysis import watch
from hf_ibnorm.base.errors import UserError
from train_lm.metrics import MetricsFile

pytestmark = pytest.mark.usefixtures(small_corpus.__name__)

NOISE = ("--model.norm_type", "layernormalnorm")
SITES = [*(f"layers.{i}.{name}_layernorm" for i in (0, 1) for name in ("input", "post_attention")), "norm"]
QUICK = ("--max_eval_blocks", "1", "--log_with", "[]")
FEW = (*QUICK, "--max_steps", "2", "--watch_norms", "9")


def norms(run_dir):
    return [json.loads(line) for line in (run_dir / "norms.jsonl").read_text().splitlines()]


def steps(run_dir):
    return [row["step"] for row in norms(run_dir)]


def flat(cells, prefix=""):
    """Cells on one level: before.quantiles.0.5."""
    found = {}
    for name, cell in cells.items():
        found |= flat(cell, f"{prefix}{name}.") if isinstance(cell, dict) else {f"{prefix}{name}": cell}
    return found


def assert_same_cells(one, other, rel):
    """`one` has no cell that `other` has not; a quantile is one to 1 % only."""
    first, second = flat(one), flat(other)
    assert first.keys() <= second.keys()
    for name, value in first.items():
        if not isinstance(value, str):
            assert second[name] == pytest.approx(value, rel=0.03 if "quantiles" in name else rel, abs=1e-5), name


@pytest.mark.parametrize("norm", ["ibnorm_t", "layernormalnorm", "rmsnorm"])
def test_a_row_is_what_the_model_does_with_all_parts_of_that_steps_batch(tmp_path, monkeypatch, norm):
    from train_lm.tasks import language

    seen, loss = [], language.token_loss

    def noting(model, inputs, targets):
        seen.append((model.training, inputs.clone()))
        return loss(model, inputs, targets)

    monkeypatch.setattr(language, "token_loss", noting)
    flags = [*QUICK, "--max_steps", "3", "--watch_norms", "3", "--checkpoint_every", "1", "--keep_last", "9"]
    noise = ["--model.norm_kwargs.noise", "0"] if norm == "layernormalnorm" else []
    run(tmp_path / "run", "--model.norm_type", norm, *noise, *flags)
    trained = [inputs for training, inputs in seen if training]
    assert steps(tmp_path / "run") == [1, 3]
    for row in norms(tmp_path / "run"):
        folder = tmp_path / "run" / "checkpoints" / f"step-{row['step'] - 1}" / "model"
        model = AutoModelForCausalLM.from_pretrained(folder).train()
        with watch(model.base_model) as statistics:
            for inputs in trained[2 * row["step"] - 2 : 2 * row["step"]]:
                model(input_ids=inputs)
        expected = statistics.result()
        assert list(row["sites"]) == list(expected) == SITES
        for site, cells in row["sites"].items():
            assert cells["rows"] == 2 * 4 * 32
            own = {"ibnorm_t": {"contraction", "saturation", "slope"}, "layernormalnorm": {"lam_hat", "p_std"}}
            assert cells.keys() == {"norm", "width", "rows", "skipped", "before", "after"} | own.get(norm, set())
            assert not {"counts", "edges", "effective_rank"} & {name.split(".")[-1] for name in flat(cells)}
            assert_same_cells(cells, expected[site], rel=1e-4)


TRACELESS = {
    "noise, dropout, recomputed": (*NOISE, "--model.dropout", "0.1", "--gradient_checkpointing", "true"),
    "gpt2, bf16, a learned lam": (
        *("--model.model_type", "gpt2", "--mixed_precision", "bf16", "--model.norm_kwargs.learn_lam", "true"),
    ),
}


@pytest.mark.parametrize("name", TRACELESS)
def test_training_is_the_same_to_the_bit(tmp_path, name):
    run(tmp_path / "plain", *QUICK, *TRACELESS[name])
    run(tmp_path / "watched", *QUICK, *TRACELESS[name], "--watch_norms", "2")
    assert result(tmp_path / "watched") == result(tmp_path / "plain")
    assert steps(tmp_path / "watched") == [1, 2, 4, 6, 8, 10]
    assert not (tmp_path / "plain" / "norms.jsonl").exists()
    assert not list((tmp_path / "plain" / "checkpoints").glob("*/norms*"))


def test_recomputed_blocks_teachers_and_adapters_are_not_counted(tmp_path):
    run(tmp_path / "source", *QUICK, "--max_steps", "2")
    source = ["--model.init_from", str(tmp_path / "source" / "final"), "--model.norm_type", "null"]
    ways = {
        "plain": [],
        "recomputed": ["--gradient_checkpointing", "true"],
        "taught": ["--teacher", str(tmp_path / "source" / "final")],
        "adapted": ["--trainable", "lora"],
    }
    for name, flags in ways.items():
        run(tmp_path / name, *FEW, *source, *flags)
    for name in ways:
        # The first forward pass is that of the source, whatever is trained afterwards.
        assert norms(tmp_path / name)[0] == norms(tmp_path / "plain")[0]
        assert steps(tmp_path / name) == [1, 2]
        assert {cells["rows"] for row in norms(tmp_path / name) for cells in row["sites"].values()} == {256}


WATCHED = (*NOISE, *QUICK, "--watch_norms", "3")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run never stopped."""
    run_dir = run_on_pages(tmp_path_factory.mktemp("straight") / "run", *WATCHED)
    assert steps(run_dir) == [1, 3, 6, 9, 10]
    return run_dir


@pytest.fixture
def stopped(straight, tmp_path):
    """The same run, stopped after step 5."""
    run_stopped(4, tmp_path / "run", *WATCHED)
    return tmp_path / "run"


def test_a_resumed_run_has_the_rows_of_one_never_stopped(straight, stopped):
    # As kills after the checkpoint could have left it: a row that will come again, half of one, and half of the file.
    (stopped / ".norms.jsonl.x1").write_text('{"step": 1, ')
    with (stopped / "norms.jsonl").open("a") as file:
        file.write('{"step": 6, "sites": {}}\n{"step": 9, "si')
    run(stopped, *WATCHED, "--resume", "auto")
    assert (stopped / "norms.jsonl").read_bytes() == (straight / "norms.jsonl").read_bytes()
    assert not (stopped / ".norms.jsonl.x1").exists()
    assert result(stopped) == result(straight)


@pytest.mark.parametrize(("every", "expected"), [(4, [1, 3, 8, 10]), (0, [1, 3])])
def test_a_resumed_run_may_watch_other_steps_or_none_and_keeps_what_it_saw(straight, stopped, every, expected):
    (stopped / "norms.jsonl").unlink()
    run(stopped, *WATCHED, "--watch_norms", str(every), "--resume", "auto")
    assert steps(stopped) == expected
    assert result(stopped) == result(straight)


def test_a_run_that_watched_nothing_may_begin_to(straight, tmp_path):
    run_stopped(4, tmp_path / "run", *NOISE, *QUICK)
    assert not (tmp_path / "run" / "norms.jsonl").exists()
    run(tmp_path / "run", *WATCHED, "--resume", "auto")
    assert norms(tmp_path / "run") == norms(straight)[2:]


def test_rows_after_the_checkpoint_do_not_outlive_a_resume_that_watches_nothing(tmp_path):
    run_stopped(1, tmp_path / "run", *QUICK, "--max_steps", "3")
    (tmp_path / "run" / "norms.jsonl").write_text('{"step": 3, "sites": {}}\n')
    run(tmp_path / "run", *QUICK, "--max_steps", "3", "--resume", "auto")
    assert not (tmp_path / "run" / "norms.jsonl").exists()


@pytest.mark.parametrize("value", [0.0, 1e30])
def test_what_is_no_number_is_left_out(tmp_path, value):
    final = run(tmp_path / "source", *QUICK, "--max_steps", "2", *NOISE)
    model = AutoModelForCausalLM.from_pretrained(final)
    model.get_input_embeddings().weight.data.copy_(torch.arange(32) * value)
    model.save_pretrained(final)
    # With the second no step can be made, which a training does not end with as if it were trained.
    failed = pytest.raises(UserError, match="grad_norm: not finite, 2 of 2 steps skipped") if value else nullcontext()
    with failed:
        run(tmp_path / "run", *FEW, "--model.init_from", str(final), "--model.norm_type", "null")
    first = norms(tmp_path / "run")[0]["sites"][SITES[0]]
    assert first["rows"] == 256
    assert all(math.isfinite(cell) for cell in flat(first).values() if not isinstance(cell, str))
    assert "skewness" not in first["after"]


def test_trackers_get_a_few_curves_of_each_site(tmp_path):
    run(tmp_path / "run", "--watch_norms", "2", "--max_steps", "4", "--max_eval_blocks", "1")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    curves = [tag for tag in events.Tags()["scalars"] if tag.startswith("norms/")]
    assert sorted({tag.split("/")[1] for tag in curves}) == SITES
    assert {tag.split("/")[2] for tag in curves if "/norm/" in tag} == {
        *("skewness", "excess_kurtosis", "near_zero", "massive", "contraction", "saturation", "slope")
    }
    logged = [(event.step, event.value) for event in events.Scalars("norms/norm/excess_kurtosis")]
    assert logged == [
        (row["step"], pytest.approx(row["sites"]["norm"]["after"]["excess_kurtosis"], rel=1e-5))
        for row in norms(tmp_path / "run")
    ]


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, monkeypatch):
    append = MetricsFile.append

    def full(self, row):
        if "sites" in row:
            raise OSError(28, "No space left on device")
        append(self, row)

    monkeypatch.setattr(MetricsFile, "append", full)
    with pytest.raises(UserError, match=r"^run_dir: norms.jsonl cannot be written: .*No space left on device$"):
        run(tmp_path / "run", *FEW)


@pytest.mark.parametrize(
    "kind",
    [
        "ddp",
        pytest.param("fsdp2", marks=pytest.mark.slow),
        pytest.param("deepspeed_zero3", marks=[needs_deepspeed, pytest.mark.slow]),
    ],
)
def test_rows_of_all_processes_are_counted(tmp_path, kind):
    # dyt and a learned λ need their parameters, which ZeRO-3 shards where it is told to shard all.
    flags = ["--model.norm_type", "ibnorm_l", "--model.norm_kwargs.learn_lam", "true", *FEW, "--model.norm_overrides"]
    flags += ["[[norm, dyt], [layers.0.*, {type: layernormalnorm, kwargs: {noise: 0}}]]"]
    script = program(tmp_path, "import train_lm.distribution\ntrain_lm.distribution.PERSISTENT = 0")
    done = launch(script, kind, "--config", "tiny", "--run_dir", tmp_path / "two", *flags)
    assert done.returncode == 0, done.stderr
    run(tmp_path / "one", *flags, "--gradient_accumulation_steps", "4")
    assert steps(tmp_path / "two") == steps(tmp_path / "one") == [1, 2]
    for one, two in zip(norms(tmp_path / "one"), norms(tmp_path / "two"), strict=True):
        assert list(two["sites"]) == SITES
        for site, cells in two["sites"].items():
            assert cells["rows"] == 2 * 256
            assert_same_cells(cells, one["sites"][site], rel=1e-3)
