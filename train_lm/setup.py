"""Task and model of a run, before anything is wrapped or trained."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from hf_ibnorm.base.errors import UserError, bad_input

from .checkpoint import skeleton_of
from .model import scheduled_lams, shared_weights_sha
from .resume import check_settings
from .settings import TrainConfig
from .start import Start, together
from .tasks import Task
from .tasks.language import open_task
from .trainable import add_adapters, freeze


@dataclass
class Setup:
    """The model of a run and the task it is trained on."""

    config: TrainConfig  # with every field resolved
    model: PreTrainedModel
    skeleton: PreTrainedModel  # the model without values, neither wrapped, sharded nor compiled, and without adapters
    task: Task
    hashes: dict[str, str | None]
    lams: dict[str, tuple[float, float]]  # site → λ at the start and at the end of its schedule
    flops_per_token: float

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
    setup = together(accelerator, lambda: _set_up(config, accelerator, start, say))
    if len({json.dumps(each, sort_keys=True) for each in gather_object([setup.hashes])}) > 1:
        raise UserError("corpus: the processes have different text, tokenizers, initial weights or teachers")
    return setup


def _set_up(config: TrainConfig, accelerator: Accelerator, start: Start, say: Callable[[str], None]) -> Setup:
    task = open_task(config, start, accelerator, say)
    model, model_config = task.make_model(start)
    config, checkpoint = task.config, start.checkpoint
    with bad_input():
        freeze(model, config)
    init_sha = checkpoint.state["hashes"]["init_sha"] if checkpoint else shared_weights_sha(model)
    named = {"init_sha": ("initial model", init_sha), **task.hashes()}
    check_settings(config, start, accelerator.num_processes, named)
    task.read_data()
    with bad_input():
        lams = scheduled_lams(config, model, model_config)
        skeleton = skeleton_of(model)
        add_adapters(model, config)
    hashes = {key: sha for key, (_, sha) in named.items()}
    return Setup(config, model, skeleton, task, hashes, lams, task.flops_per_token(skeleton))
