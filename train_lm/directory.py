"""The run directory: taking possession of it, and its files beside the checkpoints."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import PreTrainedModel

from hf_ibnorm.base import layout
from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.files import atomic_directory, write_json, write_text
from hf_ibnorm.base.manifest import write_manifest
from hf_ibnorm.base.room import check_disk
from hf_ibnorm.report.environment import environment_record

from .metrics import MetricsFile
from .push import is_repo
from .resume import record_of
from .settings import TrainConfig, harmless_settings
from .start import Start, alone_in_run
from .state import State


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


def save_model(path: Path, model: PreTrainedModel, processor: Any) -> None:
    """Save a model and its tokenizer as one directory that `from_pretrained` loads, whole or not at all."""
    with atomic_directory(path) as directory:
        model.save_pretrained(directory)
        processor.save_pretrained(directory)
        write_manifest(directory)
