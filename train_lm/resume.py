"""Checks before a resume: settings, data and software must be the same as when the run began."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_ibnorm.base import layout
from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.manifest import is_absent
from hf_ibnorm.base.reading import read_json
from hf_ibnorm.report.environment import numerics_record
from hf_ibnorm.report.runs import differing_settings, flat_settings

from .architecture import build_model_config, resolved
from .model import starting_config
from .settings import TrainConfig, harmless_settings
from .start import Start

_SAME_BUT_SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps")


def check_finished(config: TrainConfig, run_dir: Path, start: Start, processes: int) -> None:
    """Raise UserError where the finished run in `run_dir` had other settings."""
    if start.saved is not None:
        with bad_input():
            if config.model.init_from is None:
                built = build_model_config(config, start.saved["model"]["vocab_size"])
            else:
                built = starting_config(config, run_dir / layout.FINAL, start.saved)[1]
        check_settings(resolved(config, built), start, processes, {})


def check_settings(config: TrainConfig, start: Start, processes: int, hashes: Mapping[str, str | None]) -> None:
    """Raise UserError where the result of going on would not be the result of a run never interrupted.

    `config` has every field resolved; `hashes` are those of `Task.hashes` and of the initial model.
    """
    checkpoint = start.checkpoint
    if start.saved is not None:
        state = checkpoint.state if checkpoint else record_of(Path(config.run_dir)) or {"num_processes": processes}
        now = json.loads(json.dumps(config.as_recipe()))
        if changed := changed_fields(start.saved, now, (int(state["num_processes"]), processes)):
            raise UserError(f"resume: {'; '.join(changed)}; a resumed run keeps its settings")
    if checkpoint is None:
        return
    state = checkpoint.state
    for key, sha in hashes.items():
        if sha != state["hashes"][key]:
            name = layout.HASHES[key]
            raise UserError(
                f"resume: the {name} is not what the run began with ({key}); put it back, or begin a new run"
            )
    if config.streaming and processes != state["num_processes"]:
        raise UserError(
            f"resume: the stream was dealt out to {state['num_processes']} processes, got {processes}; what each of "
            "them has read, and holds in its shuffle buffer, cannot be dealt out anew"
        )
    now = numerics_record()
    if processes != state["num_processes"]:  # then no bits are promised, and launchers set the number of threads
        now["threads"] = state["numerics"].get("threads")
    changed = [
        f"{name} was {was!r}, is {now.get(name)!r}" for name, was in state["numerics"].items() if was != now.get(name)
    ]
    if changed and config.resume != "inexact":
        raise UserError(
            f"resume: {'; '.join(changed)}; the result would not be the same to the bit (--resume inexact goes on "
            "anyway)"
        )


def changed_fields(then: dict[str, Any], now: dict[str, Any], processes: tuple[int, int]) -> list[str]:
    """The settings that a resumed run may not change and has changed: "field was X, got Y" for each.

    `then` and `now` are from `as_recipe()`. With another number of `processes`, a step may be divided in another way.
    """
    # A field that an earlier release lacked had the value that is its default now, but for BOS, which it never added.
    known = {**flat_settings(TrainConfig("").as_recipe()), "add_bos": False}
    before, after = {**known, **flat_settings(then)}, flat_settings(now)
    sizes = [
        each * math.prod(side[name] for name in _SAME_BUT_SPLIT)
        for each, side in zip(processes, (before, after), strict=True)
    ]
    free = {*harmless_settings(), *(_SAME_BUT_SPLIT if sizes[0] == sizes[1] and processes[0] != processes[1] else ())}
    differing = differing_settings([before, after], free)
    changed = [f"{name} was {was!r}, got {got!r}" for name, (was, got) in differing.items()]
    if not changed and sizes[0] != sizes[1]:
        changed.append(
            f"a step had {sizes[0]} sequences with {processes[0]} processes, with {processes[1]} it has {sizes[1]}; "
            "set gradient_accumulation_steps or per_device_train_batch_size so that it has as many"
        )
    return changed


def record_of(run_dir: Path) -> dict[str, Any] | None:
    """Content of a run's `environment.json`; None where it is missing or damaged: no result depends on it."""
    try:
        form = {"num_processes": int, "resumed?": list}
        return dict(read_json("run_dir", run_dir / layout.ENVIRONMENT, form))
    except UserError as error:
        if isinstance(error.__cause__, OSError) and not is_absent(error.__cause__):
            raise
        return None
