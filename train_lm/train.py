"""The training loop, to be read from top to bottom: prepare, then step after step, then the final model."""

import math
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ibnorm.base.command import require_extra
from hf_ibnorm.base.errors import Stopped, UserError, bad_input
from hf_ibnorm.base.files import sha256
from hf_ibnorm.report.environment import cpu_name
from hf_ibnorm.report.runs import SKIPPED_SHARE
from hf_ibnorm.swap.optim import no_decay_parameter_names

from .checkpoint import Checkpointer, Snapshot
from .config import TrainConfig, build_model_config
from .data import IGNORE, PackedData, PackedTokens
from .distribution import Spread, make_accelerator, reshard
from .metrics import MetricsFile, check_trackers, start_trackers
from .prepare import (
    Run,
    check_finished,
    check_space,
    note_resume,
    prepare,
    save_model,
    write_run_files,
)
from .progress import Progress
from .push import push
from .signals import StopSignals
from .start import Start, agree, agree_on_start, alone_in_run, raise_together, together
from .state import State
from .throughput import peak_flops, peak_memory_gb
from .watching import curves, read, watched


def train(config: TrainConfig) -> Path:
    """Train a model and return the directory of the finished one.

    The run directory then holds `config.yaml` (a recipe that repeats the run), `environment.json`, `metrics.jsonl`
    (one object a step), `norms.jsonl` (where `watch_norms` asks for it), `checkpoints/step-N/` and `final/`; `final`
    and each checkpoint's `model/` are loaded by `from_pretrained`, tokenizer included.

    Args:
        config: the run, as `TrainConfig` documents it.

    Returns:
        `run_dir/final`.

    Raises:
        UserError: bad input, before anything is written; a disk that is full; training diverged, or skipped many
            steps, with what was learnt kept on disk; or the Hub does not take the model, which is finished and on disk.
        Stopped: SIGTERM, SIGINT, SIGHUP or SIGUSR1 came; a checkpoint of the last step is on disk.
    """
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        return _train(config, signals, stack)


def _train(config: TrainConfig, signals: StopSignals, stack: ExitStack) -> Path:
    with bad_input():
        config.validate()
        if config.model.init_from is None:
            build_model_config(config)  # its errors come before any work on the data
    check_trackers(config.log_with)
    if config.push_to_hub is not None:
        require_extra("train", "matplotlib")
    if config.trainable == "lora":
        require_extra("train", "peft")
    run_dir = Path(config.run_dir)
    final = run_dir / "final"
    accelerator = make_accelerator(config)
    stack.callback(end_tracking, accelerator)
    with bad_input():
        config = config.spread_over(accelerator.num_processes)
    start = agree_on_start(config, run_dir, accelerator, stack)
    progress = Progress(config.max_steps, accelerator.is_main_process, config.progress_seconds)
    if start.finished:
        check_finished(config, run_dir, start, accelerator)
        progress.say(*start.messages)
        if config.push_to_hub is not None:
            progress.say(f"to push it again: python -m train_lm.push {run_dir} --repo {config.push_to_hub}")
        return final

    run = prepare(config, accelerator, start, progress.say)
    progress.say(*start.messages)
    stack.callback(run.train.close)
    config, checkpoint = run.config, start.checkpoint()
    if config.model.init_from is not None or checkpoint is not None:
        what = "model: " if checkpoint is None else "resume: "
        agree(run.model.named_parameters(), f"{what}weights before the first step", accelerator)
    speed_up(run.model, config)
    model, optimizer = accelerator.prepare(run.model, build_optimizer(run.model, config))
    spread = Spread(model, accelerator)
    state = State(run, spread, optimizer, accelerator)
    settle_buckets(model, config, accelerator)
    set_seed(config.seed, device_specific=True)  # from here on only norms and dropout draw: differently on each process
    progress.say(*state.restore(checkpoint) if checkpoint else ())
    run.set_lam(lam_fraction(state.step, config))
    main = accelerator.is_main_process
    together(accelerator, lambda: begin_writing(run_dir, state, start, config, stack) if main else None)
    checkpointer = Checkpointer(run_dir / "checkpoints", config.keep_last, config.keep_every, state.step, start.damaged)
    stack.callback(checkpointer.wait)
    if checkpoint is None:
        checkpointer.write(state.snapshot(checkpointer))
        checkpointer.wait()
    raise_together(checkpointer.problem, accelerator)
    together(accelerator, lambda: start_trackers(accelerator, run_dir, config, state.step))
    progress.say(describe(run, config, accelerator))

    stack.enter_context(progress)
    if state.step < config.max_steps:
        raise_together(run.train.trouble(), accelerator)
    signals.finish_steps = True
    evaluated = model if spread.deepspeed else run.model  # not through DDP, which would send buffers round
    if state.row is not None and not conclude(state, evaluated, config, progress, checkpointer, signals):
        raise Stopped(f"before the validation of step {state.step}; go on with --resume auto")
    waiting: list[Snapshot | None] = []  # written when a finite step has shown that its weights are good
    peak = peak_flops(device_name(accelerator), config.mixed_precision)
    for step in range(state.step + 1, config.max_steps + 1):
        started = time.perf_counter()
        model.train()
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        run.set_lam(lam_fraction(step, config))
        batch = run.train.next()
        moved = state.gains_moved()

        loss_sum, kl_sum = torch.zeros(2, device=accelerator.device)
        with watched(run.model, step, config) as statistics:
            for i, part in enumerate(batch.parts, 1):
                inputs, targets = (tensor.to(accelerator.device, non_blocking=True) for tensor in part)
                last = i == len(batch.parts)
                with spread.part_of_step(last):
                    if run.teacher is None:
                        part_sum = token_loss(model, inputs, targets)
                    else:
                        part_sum, part_kl = run.teacher.loss(model, inputs, targets)
                        kl_sum += part_kl
                    # Gradients are averaged over processes, hence the factor: every token of the step weighs alike.
                    spread.backward(part_sum, accelerator.num_processes / batch.tokens, last)
                loss_sum += part_sum.detach()
        norm = spread.clip(config.max_grad_norm)

        # The one place where processes tell each other something, and where the host waits for the device.
        numbers = torch.stack([loss_sum, kl_sum, norm, moved]).double()
        problem = checkpointer.problem
        trouble = run.train.trouble(lambda: bool(signals.name)) if step < config.max_steps else None  # with the next
        asked = [bool(signals.name or trouble), bool(problem), int(batch.sha[:12], 16), batch.bad]
        told = accelerator.gather(torch.cat([numbers, numbers.new_tensor(asked)])[None]).T.tolist()
        losses, divergences, (grad_norm, *_), moves, stops, failures, parts, bad = told
        loss = math.fsum(losses) / batch.tokens if all(map(math.isfinite, losses)) else math.nan
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if any(failures):
            raise_together(problem, accelerator)
        if finite or config.mixed_precision == "fp16":  # whose scaler skips the step by itself, and needs to know
            optimizer.step()
            finite = finite and not optimizer.step_was_skipped
        optimizer.zero_grad()
        if finite and waiting:
            proven = waiting.pop()
            # Before a kill there may be time to write one of this size, and the newer one comes below.
            if not any(stops) or (proven and checkpointer.keeps(proven.step)):
                checkpointer.write(proven)
        state.count(batch.tokens, "" if finite else "grad_norm" if math.isfinite(loss) else "loss")
        sites = read(statistics, accelerator) if statistics else {}

        seconds = time.perf_counter() - started
        speed = batch.tokens / seconds
        row: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "lr": lr,
            "tokens": state.tokens,
            "tokens_per_second": speed,
            "grad_norm": grad_norm,
            "gain_movement": state.gain_movement(moves),
            "batch_sha": batch.sha if run.train.shared_sha else sha256(map(str, parts))[:16],
            "mfu": peak and speed * state.flops_per_token / (peak * accelerator.num_processes),
            "memory_gb": peak_memory_gb(accelerator.device),
        }
        if run.teacher is not None:
            row["kl"] = math.fsum(divergences) / batch.tokens if finite else math.nan
        if config.max_bad_documents:
            row["bad_documents"] = int(sum(bad))
        if run.lams:
            row["lam_fraction"] = lam_fraction(step, config)
        if not finite:
            row["skipped"] = state.skipped
        if sites:
            note_norms(sites, state)
        state.row = row
        stopping = not conclude(state, evaluated, config, progress, checkpointer, signals, stop=any(stops))
        stopping |= any(stops) and step < config.max_steps
        if stopping or (config.checkpoint_every and step % config.checkpoint_every == 0 and finite):
            waiting = [state.snapshot(checkpointer)]
        if stopping or step == config.max_steps:
            while waiting:
                checkpointer.write(waiting.pop(), prune=finite)
            checkpointer.wait()
            # This waits for every process as well: a launcher kills the others as soon as one has ended.
            raise_together(checkpointer.problem, accelerator)
        if stopping:
            saved = f"after step {step}, with a checkpoint; go on with --resume auto"
            raise_together(trouble and type(trouble)(f"{trouble}; stopped {saved}"), accelerator)
            raise Stopped(saved)

    check_trained(state, config, checkpointer)
    finished = state.model_on_host()
    if finished is not None:
        with bad_input(OSError, SafetensorError, about=f"run_dir: {final} cannot be written: "):
            save_model(final, finished, run.tokenizer)
        progress.say(f"finished: {final}{skipped_text(state, config)}")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and config.push_to_hub is not None:  # an upload may outlast the others' patience
        push(run_dir, config.push_to_hub, say=progress.say)
    return final


def speed_up(model: PreTrainedModel, config: TrainConfig) -> None:
    """Recompute activations and compile blocks, as the settings ask; in place, so that no name in a checkpoint changes.

    Must come before Accelerate wraps the model, and after it was copied: a compiled block cannot be.
    """
    if config.gradient_checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about its name: the oldest Transformers knows no other
            # With the generators' states kept, noise norms and dropout draw the same again.
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": True})
    if config.compile:
        for block in model.base_model.get_submodule(model.config.norm_pin.blocks):
            block.compile()


def settle_buckets(model: nn.Module, config: TrainConfig, accelerator: Accelerator) -> None:
    """Let DDP arrange its buckets before the first step that counts.

    It does so after the first backward pass it sees, and from three processes on, sums are rounded otherwise then: the
    first step after a resume would not be the step it was in the run never interrupted. Shapes are those of a step, or
    blocks would be compiled for others first.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model.train()
        shape = (config.per_device_train_batch_size, config.block_size)
        tokens = torch.zeros(shape, dtype=torch.int64, device=accelerator.device)
        accelerator.backward(token_loss(model, tokens, tokens))
        model.zero_grad()


def begin_writing(run_dir: Path, state: State, start: Start, config: TrainConfig, stack: ExitStack) -> None:
    """Take possession of the run directory and, for a new run, write what is known before the first step.

    Raises:
        UserError: another run writes there, or there is no room.
    """
    checkpoint = start.checkpoint()
    with bad_input(OSError, about=f"run_dir: {run_dir} cannot be written: "):
        check_space(run_dir, state.run.skeleton, config, resumed=checkpoint is not None)
        if checkpoint is None:
            run_dir.mkdir(parents=True, exist_ok=True)
            if not start.locked:
                stack.enter_context(alone_in_run(run_dir))
                if (run_dir / "config.yaml").exists():
                    raise UserError(f"run_dir: {run_dir} has become that of another run; name a new directory")
            write_run_files(run_dir, state.run, state.accelerator)
        else:
            note_resume(run_dir, state.step, state.accelerator)
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        state.metrics = MetricsFile(run_dir / "metrics.jsonl", checkpoint.metrics if checkpoint else b"")
        stack.callback(state.metrics.close)
        watched_so_far = checkpoint.norms if checkpoint else b""
        if config.watch_norms or watched_so_far:
            state.norms = MetricsFile(run_dir / "norms.jsonl", watched_so_far)
            stack.callback(state.norms.close)
        else:
            (run_dir / "norms.jsonl").unlink(missing_ok=True)  # of steps after the checkpoint


def end_tracking(accelerator: Accelerator) -> None:
    with suppress(OSError):  # of a tracker that cannot write its last words
        accelerator.end_training()


def note_norms(sites: dict[str, Any], state: State) -> None:
    """Write down what was seen of the norms in the step just done."""
    if state.norms:  # on the first process
        with bad_input(OSError, about="run_dir: norms.jsonl cannot be written: "):
            state.norms.append({"step": state.step, "sites": sites})
    log(curves(sites), state)


def log(values: dict[str, Any], state: State) -> None:
    """Tell the trackers."""
    with bad_input(OSError, about="log_with: a tracker cannot write: "):
        state.accelerator.log(values, step=state.step)


def conclude(
    state: State,
    model: nn.Module,
    config: TrainConfig,
    progress: Progress,
    checkpointer: Checkpointer,
    signals: StopSignals,
    stop: bool = False,
) -> bool:
    """Validate where that is due, and write down the row of the step just done.

    Args:
        state: with the row.
        model: what is validated.
        config, progress, checkpointer, signals: the run's.
        stop: whether a process is to stop already, as all of them know.

    Returns:
        False where validation was broken off because a process is to stop: the row stays in `state`, for a checkpoint
        that the time of a validation must not be lost before.

    Raises:
        UserError: as `check_health`; or the disk is full.
    """
    assert state.row is not None
    row, accelerator = state.row, state.accelerator
    if state.step % config.eval_every == 0 or state.step == config.max_steps:
        loss = None if stop else evaluate(model, state.run.validation, config, accelerator, lambda: bool(signals.name))
        if loss is None:
            return False
        row["eval_loss"] = loss
    if accelerator.is_main_process:
        with bad_input(OSError, about="run_dir: metrics.jsonl cannot be written: "):
            state.metrics.append(row)
        progress.update(row)
    log({key: value for key, value in row.items() if isinstance(value, int | float)}, state)
    state.row = None
    check_health(row, state, config, checkpointer)
    return True


def check_trained(state: State, config: TrainConfig, checkpointer: Checkpointer) -> None:
    """Refuse to call finished what was hardly trained.

    Raises:
        UserError: a large share of the steps were skipped.
    """
    if sum(state.lost.values()) >= SKIPPED_SHARE * config.max_steps:
        checkpointer.wait()
        raise UserError(
            f"{' and '.join(state.lost)}: not finite{skipped_text(state, config)}: too many to call this run trained; "
            f"{reasons(config)}; the last checkpoint is step-{checkpointer.newest}"
        )


def skipped_text(state: State, config: TrainConfig) -> str:
    """How many steps were skipped in all; nothing where none was."""
    skipped = sum(state.lost.values())
    return f", {skipped} of {config.max_steps} steps skipped" if skipped else ""


def reasons(config: TrainConfig) -> str:
    """What a loss or gradient may be lost of."""
    teacher = ", or the logits of the teacher are not finite" * (config.teacher is not None)
    return f"a learning_rate of {config.learning_rate:g} may be too high{teacher}"


def check_health(row: dict[str, Any], state: State, config: TrainConfig, checkpointer: Checkpointer) -> None:
    """Stop a run whose numbers are lost; checkpoints of better days stay.

    Raises:
        UserError: too many steps in a row were skipped, or the validation loss is not finite.
    """
    name = next((name for name in ("loss", "grad_norm") if not math.isfinite(row[name])), "eval_loss")
    if state.skipped >= config.max_skipped_steps or not math.isfinite(row.get("eval_loss", 0.0)):
        checkpointer.wait()
        raise UserError(
            f"{name}: got {row[name]} at step {row['step']}, {state.skipped} steps in a row skipped; "
            f"training diverged: {reasons(config)}; the last checkpoint is step-{checkpointer.newest}"
        )


def describe(run: Run, config: TrainConfig, accelerator: Accelerator) -> str:
    """What is about to happen, in one line."""
    model, sequences = run.model.config, run.train.layout.sequences
    tokens = f"{run.train.packed.targets:,} training tokens" if isinstance(run.train, PackedData) else "a stream"
    device = device_name(accelerator)
    known = peak_flops(device, config.mixed_precision) is not None
    trained = sum(each.numel() for each in run.model.parameters() if each.requires_grad)
    part = "" if config.trainable == "all" else f" ({config.trainable}: {trained:,} trained)"
    return (
        f"{model.norm_type}{' (with overrides)' if model.norm_overrides else ''}: "
        f"{run.skeleton.num_parameters():,} parameters{part}, {tokens} of {config.corpus}, "
        f"{config.max_steps:,} steps of {sequences * config.block_size:,}; "
        f"initial shared weights {(run.hashes['init_sha'] or '')[:16]}; "
        f"{device}{'' if known else ' (peak FLOP/s unknown, so no MFU)'}"
    )


def device_name(accelerator: Accelerator) -> str:
    """What the run computes on."""
    return torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else cpu_name()


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what is trained that decays matrices only."""
    kept = set(no_decay_parameter_names(model))
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    groups = [
        {"params": [p for name, p in parameters.items() if name not in kept], "weight_decay": config.weight_decay},
        {"params": [p for name, p in parameters.items() if name in kept], "weight_decay": 0.0},
    ]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of `step` (from 1): linear warmup to the peak, then a cosine to `min_lr_rate` of it at the end."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    floor = config.min_lr_rate
    return config.learning_rate * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


def lam_fraction(step: int, config: TrainConfig) -> float:
    """λ of `step` as a fraction of its final value."""
    return 1.0 if config.lam_schedule == "constant" else min(1.0, step / config.lam_warmup_steps)


def token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods, in nats, of the targets that count."""
    logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: PackedTokens,
    config: TrainConfig,
    accelerator: Accelerator,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean loss in nats over every token of a whole split, in eval mode: dropout and noise norms are quiet.

    Every process takes equally many batches, some of padding: where the model is sharded, all must run it together.
    None where a process was asked to stop meanwhile.

    Raises:
        RuntimeError: a part of the model stays in training mode.
    """
    model.eval()
    if loud := [name for name, module in accelerator.unwrap_model(model).named_modules() if module.training]:
        raise RuntimeError(f"{', '.join(loud)}: still in training mode, the loss would be that of a noisy model")
    size = config.per_device_eval_batch_size
    total = torch.zeros((), dtype=torch.float64)
    processes = accelerator.num_processes
    share = np.arange(accelerator.process_index, -(-data.blocks // processes) * processes, processes)
    for start in range(0, len(share), size):
        if accelerator.gather(torch.tensor([asked_to_stop()], device=accelerator.device)).any():
            reshard(model)  # or the snapshot that follows would miss what the optimizer knows by its parts
            return None
        batch = data.batch(share[start : start + size])
        inputs, targets = (tensor.to(accelerator.device) for tensor in batch)
        total += token_loss(model, inputs, targets).double().cpu()
    reshard(model)
    summed = accelerator.reduce(total.to(accelerator.device), "sum")
    return summed.item() / data.targets
