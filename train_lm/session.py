"""A run under way and its directory: everything the loop works with, put together before the first step."""

import math
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from safetensors import SafetensorError
from torch import nn

from hf_ibnorm.base import layout
from hf_ibnorm.base.command import require_extra
from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.files import atomic_directory, write_json, write_text
from hf_ibnorm.base.manifest import write_manifest
from hf_ibnorm.base.room import check_disk
from hf_ibnorm.base.signals import StopSignals
from hf_ibnorm.report.environment import cpu_name, environment_record
from hf_ibnorm.report.runs import SKIPPED_SHARE

from .architecture import build_model_config
from .checkpoint import Checkpointer
from .distribution import Spread, Zero, make_accelerator
from .metrics import MetricsFile, check_trackers, curves, start_trackers
from .model import speed_up
from .optim import build_optimizer, lam_fraction, learning_rate
from .progress import Progress
from .push import is_repo, push
from .resume import check_finished, record_of
from .settings import TrainConfig, harmless_settings
from .start import Start, agree_on_start, alone_in_run, check_same, raise_together, together
from .state import Setup, State, set_up
from .tasks import Task
from .throughput import peak_flops


@dataclass
class Session:
    """A run under way."""

    config: TrainConfig  # with every field resolved
    setup: Setup  # model and task
    state: State  # everything that changes from step to step, as a checkpoint holds it
    model: nn.Module  # as Accelerate has wrapped it
    checkpointer: Checkpointer
    progress: Progress
    signals: StopSignals
    accelerator: Accelerator
    peak: float | None  # the most FLOP/s that the device can do; None where that is not known

    def asked_to_stop(self) -> bool:
        """Whether a signal has come."""
        return bool(self.signals.name)

    def set_schedules(self, step: int) -> float:
        """Set the learning rate, which is returned, and λ to their values in `step`."""
        lr = learning_rate(step, self.config)
        for group in self.state.optimizer.param_groups:
            group["lr"] = lr
        self.setup.set_lam_fraction(lam_fraction(step, self.config))
        return lr

    def conclude(self, stop: bool = False) -> bool:
        """Validate where a validation is due, and write the metrics of the step just done.

        False where a process is to `stop` already, or a signal has ended the validation. The metrics then stay in
        `state.row`, and the checkpoint, which must not wait, holds them.
        """
        state, row = self.state, self.state.row
        assert row is not None
        if state.step % self.config.eval_every == 0 or state.step == self.config.max_steps:
            # Not through DDP, which would broadcast buffers.
            model = self.model if isinstance(state.spread, Zero) else self.setup.model
            loss = None if stop else self.setup.task.evaluate(model, self.asked_to_stop)
            if loss is None:
                return False
            row["eval_loss"] = loss
        if self.accelerator.is_main_process:
            with bad_input(OSError, about=f"run_dir: {layout.METRICS} cannot be written: "):
                state.metrics.append(row)
            self.progress.update(row)
        self.log({key: value for key, value in row.items() if isinstance(value, int | float)})
        state.row = None
        # A run whose numbers are lost ends; its earlier checkpoints stay.
        if state.skipped >= self.config.max_skipped_steps or not math.isfinite(row.get("eval_loss", 0.0)):
            name = next((name for name in ("loss", "grad_norm") if not math.isfinite(row[name])), "eval_loss")
            self.give_up(
                f"{name}: got {row[name]} at step {row['step']}, {state.skipped} steps in a row skipped; "
                "training diverged:"
            )
        return True

    def note_norms(self, sites: dict[str, Any]) -> None:
        """Write the statistics of the norms in the step just done, by site."""
        if self.state.norms:  # on the first process
            with bad_input(OSError, about=f"run_dir: {layout.NORMS} cannot be written: "):
                self.state.norms.append({"step": self.state.step, "sites": sites})
        self.log(curves(sites))

    def log(self, values: dict[str, Any]) -> None:
        """Send `values` to the trackers."""
        with bad_input(OSError, about="log_with: a tracker cannot write: "):
            self.accelerator.log(values, step=self.state.step)

    def give_up(self, problem: str) -> NoReturn:
        """Raise UserError: the `problem`, likely reasons of it, and the newest checkpoint."""
        self.checkpointer.wait()
        teacher = ", or the logits of the teacher are not finite" * (self.config.teacher is not None)
        raise UserError(
            f"{problem} a learning_rate of {self.config.learning_rate:g} may be too high{teacher}; the last checkpoint "
            f"is {layout.checkpoint_name(self.checkpointer.newest)}"
        )

    def save(self) -> None:
        """Write the finished model, and push it if the settings say so; UserError where many steps were skipped."""
        config, lost = self.config, self.state.lost
        skipped = f", {lost.total()} of {config.max_steps} steps skipped" if lost else ""
        if lost.total() >= SKIPPED_SHARE * config.max_steps:
            self.give_up(f"{' and '.join(lost)}: not finite{skipped}: too many to call this run trained;")
        run_dir = Path(config.run_dir)
        final = run_dir / layout.FINAL
        finished = self.state.model_on_host()
        if finished is not None:
            unwritten = bad_input(OSError, SafetensorError, about=f"run_dir: {final} cannot be written: ")
            with unwritten, atomic_directory(final) as folder:
                finished.save_pretrained(folder)
                self.setup.task.processor.save_pretrained(folder)
                write_manifest(folder)
            self.progress.say(f"finished: {final}{skipped}")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process and config.push_to_hub is not None:
            push(run_dir, config.push_to_hub, say=self.progress.say)  # may take longer than the others wait


def begin(config: TrainConfig, signals: StopSignals, stack: ExitStack) -> Session | None:
    """Everything before the first step, or before the next step of a run that goes on; None for a finished run.

    Everything that is opened here is closed by `stack`.
    """
    check_config(config)
    accelerator = make_accelerator(config)
    stack.callback(_end_tracking, accelerator)
    with bad_input():
        config = config.spread_over(accelerator.num_processes)
    run_dir = Path(config.run_dir)
    start = agree_on_start(config, run_dir, accelerator, stack)
    progress = Progress(config.max_steps, accelerator.is_main_process, config.progress_seconds)
    if start.finished:
        check_finished(config, run_dir, start, accelerator.num_processes)
        progress.say(*start.messages)
        if config.push_to_hub is not None:
            progress.say(f"to push it again: python -m train_lm.push {run_dir} --repo {config.push_to_hub}")
        return None

    setup = set_up(config, accelerator, start, progress.say)
    progress.say(*start.messages)
    stack.callback(setup.task.batches.close)
    config, checkpoint = setup.config, start.checkpoint
    if config.model.init_from is not None or checkpoint is not None:
        prefix = "model: " if checkpoint is None else "resume: "
        check_same(setup.model.named_parameters(), f"{prefix}weights before the first step", accelerator)
    speed_up(setup.model, config)
    model, optimizer = accelerator.prepare(setup.model, build_optimizer(setup.model, config))
    spread = Zero if accelerator.distributed_type == DistributedType.DEEPSPEED else Spread
    state = State(setup, spread(model, accelerator), optimizer, accelerator)
    settle_buckets(model, setup.task, accelerator)
    set_seed(config.seed, device_specific=True)  # from here on only norms and dropout draw: differently on each process
    progress.say(*state.restore(checkpoint) if checkpoint else ())
    setup.set_lam_fraction(lam_fraction(state.step, config))
    together(accelerator, lambda: begin_writing(state, start, stack) if accelerator.is_main_process else None)
    checkpointer = Checkpointer(
        run_dir / layout.CHECKPOINTS, config.keep_last, config.keep_every, state.step, start.damaged
    )
    stack.callback(checkpointer.wait)
    if checkpoint is None:
        checkpointer.write(state.snapshot(checkpointer))
        checkpointer.wait()
    raise_together(checkpointer.problem, accelerator)
    together(accelerator, lambda: start_trackers(accelerator, run_dir, config, state.step))
    device = device_name(accelerator)
    peak = peak_flops(device, config.mixed_precision)
    progress.say(headline(setup, device if peak else f"{device} (peak FLOP/s unknown, so no MFU)"))
    stack.enter_context(progress.bar)
    if state.step < config.max_steps:
        raise_together(setup.task.batches.trouble(), accelerator)
    return Session(config, setup, state, model, checkpointer, progress, signals, accelerator, peak)


def check_config(config: TrainConfig) -> None:
    """Refuse settings that cannot be trained with, before any work on the data."""
    with bad_input():
        config.validate()
        if config.model.init_from is None:
            build_model_config(config)
    check_trackers(config.log_with)
    if config.push_to_hub is not None:
        require_extra("train", "matplotlib")
    if config.trainable == "lora":
        require_extra("train", "peft")


def begin_writing(state: State, start: Start, stack: ExitStack) -> None:
    """Take possession of the run directory, and write everything that is known before the first step."""
    setup, checkpoint = state.setup, start.checkpoint
    config, run_dir = setup.config, Path(setup.config.run_dir)
    with bad_input(OSError, about=f"run_dir: {run_dir} cannot be written: "):
        check_space(run_dir, setup.skeleton, config, resumed=checkpoint is not None)
        now = environment_record() | {"num_processes": state.accelerator.num_processes}
        if checkpoint is None:
            run_dir.mkdir(parents=True, exist_ok=True)
            if not start.locked:
                stack.enter_context(alone_in_run(run_dir))
                if (run_dir / layout.CONFIG).exists():
                    raise UserError(f"run_dir: {run_dir} has become that of another run; name a new directory")
            write_text(run_dir / layout.CONFIG, yaml.safe_dump(config.as_recipe(), sort_keys=False))
            record = now | {
                **setup.hashes,
                "parameters": sum(parameter.numel() for parameter in setup.skeleton.parameters()),
                "flops_per_token": setup.flops_per_token,
                "mixed_precision": config.mixed_precision,
                "on_hub": names_on_hub(config),
                "harmless_settings": harmless_settings(),
                **setup.task.record(),
            }
        else:
            record = record_of(run_dir) or now
            noted = {name: now[name] for name in ("date", "device", "versions", "num_processes", "command")}
            record["resumed"] = [*record.get("resumed", []), {"step": state.step, **noted}]
        write_json(run_dir / layout.ENVIRONMENT, record)
        (run_dir / layout.CHECKPOINTS).mkdir(exist_ok=True)
        state.metrics = MetricsFile(run_dir / layout.METRICS, checkpoint.metrics if checkpoint else b"")
        stack.callback(state.metrics.close)
        watched_so_far = checkpoint.norms if checkpoint else b""
        if config.watch_norms or watched_so_far:
            state.norms = MetricsFile(run_dir / layout.NORMS, watched_so_far)
            stack.callback(state.norms.close)
        else:
            (run_dir / layout.NORMS).unlink(missing_ok=True)  # of steps after the checkpoint


def check_space(run_dir: Path, model: nn.Module, config: TrainConfig, resumed: bool) -> None:
    """Refuse a run whose checkpoints have no room on the disk."""
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    kept = config.keep_last + 1 if config.checkpoint_every and not resumed else 1
    needed = 3 * weights * kept + 2 * weights  # AdamW has two numbers for each weight; step 0 and the final model none
    with bad_input(OSError):
        check_disk("run_dir", run_dir, needed, " for its checkpoints", "; make room or lower keep_last")


def names_on_hub(config: TrainConfig) -> list[str]:
    """Repositories, NAMESPACE/NAME, that the run loads from; on another machine the same name may be that of a path."""
    names = (config.corpus, config.validation_corpus, config.tokenizer, config.model.init_from, config.teacher)
    return sorted({name for name in names if name and not Path(name).exists() and is_repo(name)})


def settle_buckets(model: nn.Module, task: Task, accelerator: Accelerator) -> None:
    """Let DDP arrange its buckets before the first step that counts.

    DDP arranges them after its first backward pass, and with three processes or more, sums are rounded in another way
    then: the first step after a resume would not be the step that it was in the run never interrupted. The pass has
    the shapes of a step, or blocks would be compiled for other shapes first.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model.train()
        loss, _ = task.loss(model, task.blank_part())
        accelerator.backward(loss)
        model.zero_grad()


def _end_tracking(accelerator: Accelerator) -> None:
    with suppress(OSError):  # of a tracker that cannot write its last words
        accelerator.end_training()


def headline(setup: Setup, device: str) -> str:
    """The run in one line: norm, model, data, steps, device."""
    config, model = setup.config, setup.model.config
    trained = sum(parameter.numel() for parameter in setup.model.parameters() if parameter.requires_grad)
    part = "" if config.trainable == "all" else f" ({config.trainable}: {trained:,} trained)"
    return (
        f"{model.norm_type}{' (with overrides)' if model.norm_overrides else ''}: "
        f"{setup.skeleton.num_parameters():,} parameters{part}, {setup.task.summary()}; "
        f"initial shared weights {(setup.hashes['init_sha'] or '')[:16]}; {device}"
    )


def device_name(accelerator: Accelerator) -> str:
    """Name of the GPU or CPU that the run computes on."""
    return torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else cpu_name()
