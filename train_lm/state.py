"""Task and model of a run (`Setup`), and all that changes from step to step, as a checkpoint holds it (`State`)."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from transformers import PreTrainedModel

from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.report.environment import numerics_record
from hf_ibnorm.sites import is_norm

from .checkpoint import (
    Checkpoint,
    Checkpointer,
    Snapshot,
    copy_model,
    process_state,
    restore_random_states,
    skeleton_of,
)
from .distribution import Spread, mine, my_part, on_host, whole
from .metrics import MetricsFile, finite_or_none
from .model import scheduled_lams, shared_weights_sha
from .optim import add_adapters, apart, freeze, merged
from .resume import check_settings
from .settings import TrainConfig
from .start import Start, check_same, together
from .tasks import Task
from .tasks.language import open_task


@dataclass
class Setup:
    """The model of a run and the task it is trained on."""

    config: TrainConfig  # with every field resolved
    model: PreTrainedModel
    skeleton: PreTrainedModel  # the model without values, neither wrapped, sharded nor compiled, and without adapters
    task: Task
    hashes: dict[str, str | None]
    lams: dict[str, tuple[float, float]]  # site → λ at the start and at the end of its schedule
    flops_per_token: float | None  # None where they cannot be counted

    def set_lam_fraction(self, fraction: float) -> None:
        """Set every λ to where it is after this fraction of its way."""
        for site, (start, end) in self.lams.items():
            for model in (self.model, self.skeleton):
                norm: Any = model.base_model.get_submodule(site)
                norm.set_ramped((1 - fraction) * start + fraction * end)


def set_up(config: TrainConfig, accelerator: Accelerator, start: Start, say: Callable[[str], None]) -> Setup:
    """Task and model: the same on every process and, norms apart, for every norm.

    `say` gets a line about whatever takes long, and about text that is left out.
    """

    def make() -> Setup:
        task, checkpoint = open_task(config, start, accelerator, say), start.checkpoint
        model, model_config = task.make_model(start)
        with bad_input():
            freeze(model, task.config)
        init_sha = checkpoint.state["hashes"]["init_sha"] if checkpoint else shared_weights_sha(model)
        hashes = {"init_sha": init_sha, **task.hashes()}
        check_settings(task.config, start, accelerator.num_processes, hashes)
        task.read_data()
        with bad_input():
            lams = scheduled_lams(task.config, model, model_config)
            skeleton = skeleton_of(model)
            add_adapters(model, task.config)
        return Setup(task.config, model, skeleton, task, hashes, lams, task.flops_per_token(skeleton))

    setup = together(accelerator, make)
    if len({json.dumps(hashes, sort_keys=True) for hashes in gather_object([setup.hashes])}) > 1:
        raise UserError("corpus: the processes have different text, tokenizers, initial weights or teachers")
    return setup


class State:
    """The state of a run that changes from step to step, besides its model."""

    metrics: MetricsFile
    norms: MetricsFile | None = None  # None where no norm was watched
    row: dict[str, Any] | None = None
    """Metrics of the last step until they are written; a checkpoint holds them where a signal comes before that."""

    def __init__(self, setup: Setup, spread: Spread, optimizer: AcceleratedOptimizer, accelerator: Accelerator) -> None:
        self.setup, self.spread, self.optimizer, self.accelerator = setup, spread, optimizer, accelerator
        self.step = self.tokens = self.skipped = 0
        self.lost: Counter[str] = Counter()
        self.numerics = numerics_record()
        norms = {name: module for name, module in setup.model.named_modules() if is_norm(module)}
        gains = {f"{name}.weight": getattr(norm, "weight", None) for name, norm in norms.items()}
        self.gains: dict[str, Tensor] = {name: gain for name, gain in gains.items() if gain is not None}
        self.set_start_gains({name: whole(gain).clone() for name, gain in self.gains.items()})

    def set_start_gains(self, gains: dict[str, Tensor]) -> None:
        """Note the norms' gains before the first step, whole, and the part of them that this process holds."""
        self.start_gains = gains
        self.start_parts = {name: my_part(gain, self.gains[name]).flatten() for name, gain in gains.items()}

    def count(self, tokens: int, lost: str) -> None:
        """Count a finished step; `lost` names the number whose infinity or NaN made the step one to skip, or is ""."""
        self.step += 1
        self.tokens += tokens
        self.skipped = self.skipped + 1 if lost else 0
        if lost:
            self.lost[lost] += 1

    def gains_moved(self) -> Tensor:
        """Sum of the squared distances of the norms' gains from their start, over the gains that this process holds."""
        if not self.gains:
            return torch.zeros((), device=self.accelerator.device)
        moved = [mine(gain).flatten() - self.start_parts[name] for name, gain in self.gains.items()]
        return torch.cat(moved).square().sum()

    def gain_movement(self, moved: list[float]) -> float:
        """Root mean square distance of the gains from their start, given `gains_moved` of every process."""
        total = math.fsum(moved) if self.spread.sharded else moved[0]
        return math.sqrt(total / max(1, sum(gain.numel() for gain in self.start_gains.values())))

    def model_on_host(self) -> PreTrainedModel | None:
        """A copy of the model in main memory on the first process. Every process must call this."""
        first, skeleton = self.accelerator.is_main_process, self.setup.skeleton
        copies: dict[str, Any] = {name: on_host(tensor, keep=first) for name, tensor in merged(self.setup.model)}
        if not first:
            return None
        names = {id(tensor): name for name, tensor in [*skeleton.named_parameters(), *skeleton.named_buffers()]}
        return copy_model(skeleton, lambda tensor: copies[names[id(tensor)]])

    def snapshot(self, checkpointer: Checkpointer) -> Snapshot | None:
        """A copy of everything that a checkpoint holds, on the first process; the others send it their part.

        Every process must call this, and training may go on as soon as it returns.
        """
        checkpointer.wait()  # first, or there would be two copies in memory
        first, model, scaler = self.accelerator.is_main_process, self.setup.model, self.accelerator.scaler
        own = process_state(self.setup.task.batches.state())
        processes: list[Any] = [own]
        if self.accelerator.num_processes > 1:
            processes = [None] * self.accelerator.num_processes
            torch.distributed.gather_object(own, processes if first else None)
        copied = self.model_on_host()
        tensors = self.spread.optimizer_tensors(model, self.optimizer.optimizer, first)
        if copied is None:
            return None
        kept: dict[str, Mapping[str, Tensor]] = {"start": self.start_gains, "apart": apart(model)}
        for kind, named in kept.items():
            tensors |= {f"{kind}/{name}": tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}
        state = {
            "tokens": self.tokens,
            "skipped": self.skipped,
            "lost": dict(self.lost),
            "row": self.row and finite_or_none(self.row),
            "num_processes": self.accelerator.num_processes,
            "distribution": self.spread.kind,
            "config": self.setup.config.as_recipe(),
            "hashes": self.setup.hashes,
            "numerics": self.numerics,
            "scaler": scaler.state_dict() if scaler else None,
        }
        files = [file.so_far() for file in (self.metrics, self.norms) if file]
        return Snapshot(self.step, copied, self.setup.task.processor, tensors, processes, state, *files)

    def restore(self, checkpoint: Checkpoint) -> list[str]:
        """Go on where `checkpoint` was taken; the model has its weights already. Returns messages for the user."""
        accelerator, model, saved, messages = self.accelerator, self.setup.model, checkpoint.state, list[str]()
        self.step, self.tokens, self.skipped = checkpoint.step, saved["tokens"], saved["skipped"]
        self.lost.update(saved.get("lost", {}))  # an earlier release wrote neither this nor the row
        if saved.get("row") is not None:
            lost = {name: math.nan for name in ("loss", "grad_norm", "kl") if saved["row"].get(name, 0.0) is None}
            self.row = saved["row"] | lost
        tensors = together(accelerator, lambda: checkpoint.tensors)
        for name, parameter in apart(model).items():
            parameter.data.copy_(tensors[f"apart/{name}"])
        self.spread.restore_optimizer(model, self.optimizer.optimizer, tensors)
        self.set_start_gains({name: tensors[f"start/{name}"].to(accelerator.device) for name in self.start_gains})
        if accelerator.scaler and saved["scaler"]:
            accelerator.scaler.load_state_dict(saved["scaler"])
        weights = () if self.spread.sharded else (*model.named_parameters(), *model.named_buffers())
        check_same([*tensors.items(), *weights], "resume: weights and optimizer states", accelerator)
        then, now = saved["num_processes"], accelerator.num_processes
        own = checkpoint.process(accelerator.process_index if accelerator.process_index < then else 0)
        self.setup.task.batches.load_state(own["data"])
        kind = saved.get("distribution", "ddp" if then > 1 else "one")  # an earlier release had no others
        if then != now:
            set_seed(self.setup.config.seed + self.step, device_specific=True)
            messages.append(
                f"resume: {then} processes have become {now}: the batches go on in the same order, sums are rounded "
                "and noise is drawn in another way"
            )
        else:
            if kind != self.spread.kind:
                messages.append(f"resume: {kind} has become {self.spread.kind}: sums are rounded in another way")
            restore_random_states(own)  # last: nothing may draw between here and the next step
        return messages
