"""The changing state of a run, which a checkpoint holds: counts, optimizer, random generators, place in the data."""

import math
from collections import Counter
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from torch import Tensor
from transformers import PreTrainedModel

from hf_ibnorm.report.environment import numerics_record
from hf_ibnorm.sites import is_norm

from .checkpoint import Checkpoint, Checkpointer, Snapshot, copy_model, process_state, restore_random_states
from .distribution import Spread, mine, my_part, on_host, whole
from .metrics import MetricsFile, finite_or_none
from .setup import Setup
from .start import agree, together
from .trainable import apart, merged


class State:
    """The state of a run that changes from step to step, besides its model."""

    metrics: MetricsFile
    norms: MetricsFile | None = None  # None where no norm was watched
    row: dict[str, Any] | None = None
    """Metrics of the last step, until they are written down; where a signal comes before, a checkpoint has them."""

    def __init__(self, setup: Setup, spread: Spread, optimizer: AcceleratedOptimizer, accelerator: Accelerator) -> None:
        self.setup, self.spread, self.optimizer, self.accelerator = setup, spread, optimizer, accelerator
        self.step = self.tokens = self.skipped = 0
        self.lost: Counter[str] = Counter()
        self.numerics = numerics_record()
        self.flops_per_token = setup.flops_per_token
        norms = {name: module for name, module in setup.model.named_modules() if is_norm(module)}
        gains = {f"{name}.weight": getattr(norm, "weight", None) for name, norm in norms.items()}
        self.gains: dict[str, Tensor] = {name: gain for name, gain in gains.items() if gain is not None}
        self.set_start_gains({name: whole(gain).clone() for name, gain in self.gains.items()})

    def set_start_gains(self, gains: dict[str, Tensor]) -> None:
        """Note the norms' gains as they were before the first step, whole, and which part of them is held here."""
        self.start_gains = gains
        self.start_parts = {name: my_part(gain, self.gains[name]).flatten() for name, gain in gains.items()}

    def count(self, tokens: int, lost: str) -> None:
        """Count a finished step; of one that was skipped, `lost` is what was not finite in it."""
        self.step += 1
        self.tokens += tokens
        self.skipped = self.skipped + 1 if lost else 0
        if lost:
            self.lost[lost] += 1

    def gains_moved(self) -> Tensor:
        """Sum of the squares of how far the norms' gains are from where they started, over those that are held here."""
        if not self.gains:
            return torch.zeros((), device=self.accelerator.device)
        moved = [mine(gain).flatten() - self.start_parts[name] for name, gain in self.gains.items()]
        return torch.cat(moved).square().sum()

    def gain_movement(self, moved: list[float]) -> float:
        """Root mean square of how far the gains are from where they started, from `gains_moved` of every process."""
        total = math.fsum(moved) if self.spread.sharded else moved[0]
        return math.sqrt(total / max(1, sum(gain.numel() for gain in self.start_gains.values())))

    def model_on_host(self) -> PreTrainedModel | None:
        """A copy of the model in main memory on the first process. Every process must call this."""
        first, skeleton = self.accelerator.is_main_process, self.setup.skeleton
        copies: dict[str, Any] = {name: on_host(tensor, keep=first) for name, tensor in merged(self.setup.model)}
        if not first:
            return None
        names = {id(each): name for name, each in [*skeleton.named_parameters(), *skeleton.named_buffers()]}
        return copy_model(skeleton, lambda each: copies[names[id(each)]])

    def snapshot(self, checkpointer: Checkpointer) -> Snapshot | None:
        """A copy of all that a checkpoint holds, on the first process; the others send it their part.

        Every process must call this, and training may go on as soon as it returns.
        """
        checkpointer.wait()  # first, or there would be two copies in memory
        own, scaler = process_state(self.setup.task.batches.state()), self.accelerator.scaler
        processes: list[Any] = [own]
        if self.accelerator.num_processes > 1:
            processes = [None] * self.accelerator.num_processes
            torch.distributed.gather_object(own, processes if self.accelerator.is_main_process else None)
        model, first = self.model_on_host(), self.accelerator.is_main_process
        tensors = self.spread.optimizer_tensors(self.setup.model, self.optimizer.optimizer, first)
        start = {f"start/{name}": gain.to("cpu", copy=True) for name, gain in self.start_gains.items()}
        if model is None:
            return None
        tensors |= {
            f"apart/{name}": each.detach().to("cpu", copy=True) for name, each in apart(self.setup.model).items()
        }
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
        files = [each.so_far() for each in (self.metrics, self.norms) if each]
        return Snapshot(self.step, model, self.setup.task.tokenizer, tensors | start, processes, state, *files)

    def restore(self, checkpoint: Checkpoint) -> list[str]:
        """Go on where `checkpoint` was taken; the model has its weights already. Returns what the user should know."""
        saved, process, messages = checkpoint.state, self.accelerator.process_index, []
        self.step, self.tokens, self.skipped = checkpoint.step, saved["tokens"], saved["skipped"]
        self.lost.update(saved.get("lost", {}))  # as the next one, unknown to the release before
        if saved.get("row") is not None:
            lost = {name: math.nan for name in ("loss", "grad_norm", "kl") if saved["row"].get(name, 0.0) is None}
            self.row = saved["row"] | lost
        tensors = together(self.accelerator, lambda: checkpoint.tensors)
        for name, parameter in apart(self.setup.model).items():
            parameter.data.copy_(tensors[f"apart/{name}"])
        self.spread.restore_optimizer(self.setup.model, self.optimizer.optimizer, tensors)
        device = self.accelerator.device
        self.set_start_gains({name: tensors[f"start/{name}"].to(device) for name in self.start_gains})
        if self.accelerator.scaler and saved["scaler"]:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        model = self.setup.model
        weights = () if self.spread.sharded else (*model.named_parameters(), *model.named_buffers())
        agree([*tensors.items(), *weights], "resume: weights and optimizer states", self.accelerator)
        then = saved["num_processes"]
        own = checkpoint.process(process if process < then else 0)
        self.setup.task.batches.load_state(own["data"])
        if then == self.accelerator.num_processes:
            restore_random_states(own)  # last: nothing may draw between here and the next step
        else:
            set_seed(self.setup.config.seed + self.step, device_specific=True)
            messages.append(
                f"resume: {then} processes have become {self.accelerator.num_processes}: the batches go on in the same "
                "order, sums are rounded and noise is drawn in another way"
            )
        kind = saved.get("distribution", "ddp" if then > 1 else "one")  # the release before had no others
        if kind != self.spread.kind and then == self.accelerator.num_processes:
            messages.append(f"resume: {kind} has become {self.spread.kind}: sums are rounded in another way")
        return messages
