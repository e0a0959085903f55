"""The training loop, to be read from top to bottom: step after step, then the final model; set-up is in session.py."""

import math
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_ibnorm.base import layout
from hf_ibnorm.base.errors import Stopped
from hf_ibnorm.base.files import sha256
from hf_ibnorm.base.signals import StopSignals

from .checkpoint import Snapshot
from .metrics import gather_norms, watched
from .optim import lam_fraction
from .session import Session, begin
from .settings import TrainConfig
from .start import raise_together
from .tasks import Batch
from .throughput import peak_memory_gb


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
            steps, with the last good checkpoint on disk; or the Hub refuses the model, which is finished and on disk.
        Stopped: SIGTERM, SIGINT, SIGHUP or SIGUSR1 came; a checkpoint of the last step is on disk.
    """
    with ExitStack() as stack:
        _train(config, stack)
    return Path(config.run_dir) / layout.FINAL


def _train(config: TrainConfig, stack: ExitStack) -> None:
    # The session must be gone before `stack` ends the process group: if DDP's reducer is the last to hold the group,
    # its destructor waits for a thread of the group that waits for Python's lock.
    signals = stack.enter_context(StopSignals(lambda number: Stopped(f"{number.name} before the first step")))
    session = begin(config, signals, stack)
    if session is not None:
        signals.deferred = True  # from here on there is something to save
        run_steps(session)
        session.save()


def run_steps(session: Session) -> None:
    """Every step that is left."""
    config, state, checkpointer = session.config, session.state, session.checkpointer
    batches = session.setup.task.batches
    if state.row is not None and not session.conclude():
        raise Stopped(f"before the validation of step {state.step}; go on with --resume auto")
    waiting: Snapshot | None = None  # written when a finite step has shown that its weights are good
    for step in range(state.step + 1, config.max_steps + 1):
        started = time.perf_counter()
        lr = session.set_schedules(step)
        batch = batches.next()
        moved = state.gains_moved()

        session.model.train()
        with watched(session.setup.model, step, config) as statistics:
            sums = forward_backward(session, batch)
        norm = state.spread.clip(config.max_grad_norm)

        # Asked before the state changes: if the next batch cannot be made, this is the last step.
        trouble = batches.trouble(session.asked_to_stop) if step < config.max_steps else None
        gathered = exchange(session, batch, [*sums, norm, moved], stop=session.asked_to_stop() or trouble is not None)
        finite = update(session, math.isfinite(gathered.loss) and math.isfinite(gathered.grad_norm))
        if finite and waiting is not None:
            # When stopping there may be time for one checkpoint only: the newer one, below.
            if not gathered.stop or checkpointer.keeps(waiting.step):
                checkpointer.write(waiting)
            waiting = None
        state.count(batch.tokens, "" if finite else "grad_norm" if math.isfinite(gathered.loss) else "loss")
        sites = gather_norms(statistics, session.accelerator) if statistics else {}
        state.row = metrics_row(session, batch, gathered, lr, finite, time.perf_counter() - started)
        if sites:
            session.note_norms(sites)

        stopping = not session.conclude(gathered.stop) or (gathered.stop and step < config.max_steps)
        if stopping or (config.checkpoint_every and step % config.checkpoint_every == 0 and finite):
            waiting = state.snapshot(checkpointer)
        if stopping or step == config.max_steps:
            checkpointer.write(waiting, prune=finite)
            checkpointer.wait()
            # All processes wait for each other here: a launcher kills the others as soon as one has ended.
            raise_together(checkpointer.problem, session.accelerator)
        if stopping:
            saved = f"after step {step}, with a checkpoint; go on with --resume auto"
            raise_together(trouble and type(trouble)(f"{trouble}; stopped {saved}"), session.accelerator)
            raise Stopped(saved)


def forward_backward(session: Session, batch: Batch) -> Tensor:
    """Both passes over every part of a batch; returns loss and divergence of this process, summed over its targets."""
    accelerator, spread, task = session.accelerator, session.state.spread, session.setup.task
    sums = torch.zeros(2, device=accelerator.device)
    for i, part in enumerate(batch.parts, 1):
        inputs, targets = (tensor.to(accelerator.device, non_blocking=True) for tensor in part)
        last = i == len(batch.parts)
        with spread.part_of_step(last):
            loss, divergence = task.loss(session.model, (inputs, targets))
            # Gradients are averaged over processes, hence the factor: every token of the step weighs alike.
            spread.backward(loss, accelerator.num_processes / batch.tokens, last)
        sums[0] += loss.detach()
        if divergence is not None:
            sums[1] += divergence
    return sums


class Gathered(NamedTuple):
    """The numbers of a step that all processes share after its passes."""

    loss: float  # mean over the targets of the step; NaN where the loss of a process is not finite
    kl: float  # the teacher's divergence in the same way
    grad_norm: float  # before clipping
    moves: list[float]  # `State.gains_moved` of each process
    stop: bool  # whether a process is to stop
    batch_sha: str  # hash of the batch of all processes
    bad: int  # documents left out so far, because they cannot be read


def exchange(session: Session, batch: Batch, numbers: Iterable[Tensor], stop: bool) -> Gathered:
    """The one place of a step where processes exchange numbers, and where the host waits for the device.

    `numbers` are scalars: sums of the losses and the divergences, norm of the gradients, movement of the gains. Where a
    process could not write a checkpoint, all raise UserError.
    """
    accelerator, problem = session.accelerator, session.checkpointer.problem
    own = torch.stack([*numbers]).double()
    asked = [stop, bool(problem), int(batch.sha[:12], 16), batch.bad]
    columns = accelerator.gather(torch.cat([own, own.new_tensor(asked)])[None]).T.tolist()
    losses, divergences, (grad_norm, *_), moves, stops, failures, shas, bad = columns
    if any(failures):
        raise_together(problem, accelerator)
    return Gathered(
        loss=math.fsum(losses) / batch.tokens if all(map(math.isfinite, losses)) else math.nan,
        kl=math.fsum(divergences) / batch.tokens if all(map(math.isfinite, divergences)) else math.nan,
        grad_norm=grad_norm,
        moves=moves,
        stop=any(stops),
        batch_sha=batch.sha if session.setup.task.batches.shared_sha else sha256(map(str, shas))[:16],
        bad=int(sum(bad)),
    )


def update(session: Session, finite: bool) -> bool:
    """Make the optimizer's step where loss and gradients are finite; returns whether it was made."""
    optimizer = session.state.optimizer
    if finite or session.config.mixed_precision == "fp16":  # its scaler skips the step by itself, and must see it
        optimizer.step()
        finite = finite and not optimizer.step_was_skipped
    optimizer.zero_grad()
    return finite


def metrics_row(
    session: Session, batch: Batch, gathered: Gathered, lr: float, finite: bool, seconds: float
) -> dict[str, Any]:
    """The line of `metrics.jsonl` for the step just done, without the validation loss."""
    config, state, setup = session.config, session.state, session.setup
    speed, peak, flops = batch.tokens / seconds, session.peak, setup.flops_per_token
    row: dict[str, Any] = {
        "step": state.step,
        "loss": gathered.loss,
        "lr": lr,
        "tokens": state.tokens,
        "tokens_per_second": speed,
        "grad_norm": gathered.grad_norm,
        "gain_movement": state.gain_movement(gathered.moves),
        "batch_sha": gathered.batch_sha,
        "mfu": peak and flops and speed * flops / (peak * session.accelerator.num_processes),
        "memory_gb": peak_memory_gb(session.accelerator.device),
    }
    if config.teacher is not None:
        row["kl"] = gathered.kl if finite else math.nan
    if config.max_bad_documents:
        row["bad_documents"] = gathered.bad
    if setup.lams:
        row["lam_fraction"] = lam_fraction(state.step, config)
    if not finite:
        row["skipped"] = state.skipped
    return row
