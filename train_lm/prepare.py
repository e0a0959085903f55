"""What a run is made of before its first step: its text, its tokenizer, its model."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.files import atomic_directory, sha256, sha256_tensors, write_json, write_text
from hf_ibnorm.base.manifest import is_absent, write_manifest
from hf_ibnorm.base.reading import read_json
from hf_ibnorm.base.room import check_disk, check_model
from hf_ibnorm.configuration_ibnorm import NORM_FIELDS
from hf_ibnorm.data.tokens import Encoder
from hf_ibnorm.modeling_ibnorm import ramped_norms
from hf_ibnorm.norms import norm_name
from hf_ibnorm.report.environment import environment_record, numerics_record
from hf_ibnorm.sites import is_norm
from hf_ibnorm.swap.families import FAMILIES, Family
from hf_ibnorm.swap.loading import has_tokenizer, load

from .cache import Cache, encode_all
from .checkpoint import Checkpoint, skeleton_of
from .config import DROPOUTS, TrainConfig, build_model_config, changed_fields, check_vocabulary, resolved
from .corpus import CorpusOptions, Documents, HeldOut, open_corpus, overlap
from .data import Layout, PackedData, PackedTokens, StreamedData
from .distillation import Teacher
from .lost import lost_message, norms_of
from .progress import Told, silent
from .push import is_repo
from .sizes import check_sizes
from .start import Start, together
from .throughput import flops_per_token, forward_flops_per_token
from .tokenizer import load_tokenizer, train_tokenizer, wrap_tokenizer
from .trainable import add_adapters, freeze

STREAMED_TOKENIZER_DOCUMENTS = 10_000


@dataclass
class Run:
    """What a run trains and on what.

    `skeleton` is the model without values, from before anything wrapped, sharded or compiled it, or put adapters into
    it: what is saved.
    """

    config: TrainConfig
    model: PreTrainedModel
    skeleton: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    train: PackedData | StreamedData
    validation: PackedTokens
    hashes: dict[str, str | None]
    lams: dict[str, tuple[float, float]]
    """Site → λ at the start and at the end of its schedule."""
    teacher: Teacher | None = None
    bos: int | None = None
    """What documents begin with; None for nothing."""

    @property
    def flops_per_token(self) -> float:
        """Floating point operations of a token, the teacher's included."""
        own = flops_per_token(self.skeleton, self.config.block_size)
        if self.teacher is None:
            return own
        return own + forward_flops_per_token(self.teacher.model, self.config.block_size)

    def set_lam(self, fraction: float) -> None:
        """Set every λ to where it is after this fraction of its way."""
        for site, (start, end) in self.lams.items():
            for model in (self.model, self.skeleton):
                model.base_model.get_submodule(site).set_ramped((1 - fraction) * start + fraction * end)


def prepare(config: TrainConfig, accelerator: Accelerator, start: Start, say: Callable[[str], None] = silent) -> Run:
    """Text, tokenizer and model: the same on every process and, norms apart, for every norm.

    Args:
        config, accelerator, start: the run's.
        say: is told, in a line, what takes long and what of the text is left out.

    Raises:
        UserError: something of it cannot be had, or is not what the run to be resumed began with.
    """
    run = together(accelerator, lambda: _prepare(config, accelerator, start, say))
    if len({json.dumps(each, sort_keys=True) for each in gather_object([run.hashes])}) > 1:
        raise UserError("corpus: the processes have different text, tokenizers, initial weights or teachers")
    return run


def _prepare(config: TrainConfig, accelerator: Accelerator, start: Start, say: Callable[[str], None]) -> Run:
    check_sizes(config, accelerator.num_processes)
    checkpoint = start.checkpoint()
    if config.model.init_from is None:
        with bad_input():
            check_model("model", build_model_config(config))  # before a text is read
    elif checkpoint is None:
        with bad_input():
            starting_config(config, config.model.init_from, None)  # before its tokenizer is missed
    if config.teacher is not None:
        with bad_input():
            read_config("teacher", config.teacher)
    cache = Cache(config.cache_dir, say)
    texts = open_texts(config, cache)
    tokenizer = make_tokenizer(config, cache, texts["train"], checkpoint)
    model, model_config = make_model(config, tokenizer, start)
    config = resolved(config, model_config)
    with bad_input():
        freeze(model, config)
        teacher = None if config.teacher is None else load_teacher(config, config.teacher, tokenizer)
        encoder = Encoder(tokenizer, config.add_bos)
    hashes = {
        "init_sha": checkpoint.state["hashes"]["init_sha"] if checkpoint else shared_weights_sha(model),
        "tokenizer_sha": sha256(encoder.key),
        **{f"{split}_sha": documents.fingerprint for split, documents in texts.items()},
        **({} if teacher is None else {"teacher_sha": sha256_tensors(teacher.named_parameters())}),
    }
    check_settings(config, start, checkpoint, accelerator, hashes)

    size, eos, threads = config.block_size, tokenizer.eos_token_id, config.tokenizer_threads
    layout = Layout(
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        accelerator.num_processes,
        accelerator.process_index,
    )
    train: PackedData | StreamedData
    if config.streaming:
        train = StreamedData(texts["train"], encoder, size, config.seed, config.shuffle_buffer, threads, layout)
    else:
        fingerprint = texts["train"].fingerprint
        assert fingerprint is not None, "only streams have none"
        packed = PackedTokens(cache.tokens(fingerprint, encoder, texts["train"], threads), eos, size)
        train = PackedData(packed, config.seed, layout, texts["train"].bad["count"])
    stream = validation_tokens(cache, texts["validation"], encoder, config)
    for split, documents in texts.items():
        if count := documents.bad["count"]:
            first = documents.bad["first"]
            say(f"WARNING: corpus, {split}: left out because they cannot be read: {count}; the first: {first}")
    validation = PackedTokens(stream, eos, size, config.max_eval_blocks)
    with bad_input():
        lams = scheduled_lams(config, model, model_config)
        skeleton = skeleton_of(model)
        add_adapters(model, config)
    taught = None if teacher is None else Teacher(teacher.to(accelerator.device), config)
    return Run(config, model, skeleton, tokenizer, train, validation, hashes, lams, taught, encoder.bos)


def open_texts(config: TrainConfig, cache: Cache) -> dict[str, Documents]:
    """The documents of the training and the validation split."""
    options = CorpusOptions(
        *(config.corpus_config, config.text_field, config.streaming, cache.file_sha),
        *(config.max_bad_documents, cache.say),
    )
    train = open_corpus(config.corpus, "train", config.train_split, options)
    assert train is not None
    if (name := config.validation_corpus) is not None:
        try:
            validation = open_corpus(name, "alone", config.validation_split, options) or open_corpus(
                name, "train", config.train_split, options
            )
        except UserError as error:
            raise type(error)(re.sub("^(?=corpus: )", "validation_", str(error))) from error
        assert validation is not None
        if both := overlap(train, validation):
            cache.say(f"WARNING: validation_corpus: {both} is training text, too; the loss on it is no validation loss")
        return {"train": train, "validation": validation}
    if validation := open_corpus(config.corpus, "validation", config.validation_split, options):
        return {"train": train, "validation": validation}
    if config.streaming:
        raise UserError(
            f"validation_corpus: got null, and {config.corpus} has no split {config.validation_split!r}; name files or "
            "a dataset to validate on (only without streaming are documents held out)"
        )
    return {part: HeldOut(train, config.validation_every, rest=part == "train") for part in ("train", "validation")}


def make_tokenizer(
    config: TrainConfig, cache: Cache, documents: Documents, checkpoint: Checkpoint | None
) -> PreTrainedTokenizerFast:
    """The tokenizer of the checkpoint, the one asked for, or one trained on `documents`."""
    if checkpoint is not None:
        return load_tokenizer("run_dir", checkpoint.path / "model")
    return saved_and_loaded(_new_tokenizer(config, cache, documents))


def saved_and_loaded(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """`tokenizer` as a checkpoint gives it back.

    Loading adds parts that do nothing; with them from the start, a resumed run has the same tokenizer.
    """
    with bad_input(Exception, about="TMPDIR: a tokenizer cannot be written there: "), TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return load_tokenizer("tokenizer", folder)


def _new_tokenizer(config: TrainConfig, cache: Cache, documents: Documents) -> PreTrainedTokenizerFast:
    if config.tokenizer is not None or config.model.init_from is not None:
        field = "tokenizer" if config.tokenizer is not None else "model.init_from"
        return load_tokenizer(field, config.tokenizer or config.model.init_from or "")
    limit = config.tokenizer_documents or (STREAMED_TOKENIZER_DOCUMENTS if config.streaming else None)

    def trained() -> str:
        told = Told(cache.say, "training a tokenizer")
        text = train_tokenizer(told.each(islice(documents, limit)), config.tokenizer_vocab_size)
        documents.confirm()
        return text

    if documents.fingerprint is None:
        text = trained()
    else:
        text = cache.text("tokenizer", [documents.fingerprint, str(config.tokenizer_vocab_size), str(limit)], trained)
    return wrap_tokenizer(text, config.model.max_position_embeddings or config.block_size)


def validation_tokens(cache: Cache, documents: Documents, encoder: Encoder, config: TrainConfig) -> np.ndarray:
    """The validation split as tokens, from the cache where its text has a hash."""
    if documents.fingerprint is not None:
        return cache.tokens(documents.fingerprint, encoder, documents, config.tokenizer_threads)
    wanted = None if config.max_eval_blocks is None else config.max_eval_blocks * config.block_size + 1
    chunks, have = [], 0
    for ids in encode_all(encoder, documents, config.tokenizer_threads):
        chunks.append(ids)
        have += len(ids)
        if wanted is not None and have >= wanted:
            break
    if not chunks:
        raise UserError("validation_split: it has no document")
    return np.concatenate(chunks)


def make_model(config: TrainConfig, tokenizer: PreTrainedTokenizerFast, start: Start) -> tuple[PreTrainedModel, Any]:
    """The model to train in float32, and the config it began with (λ may have been ramped since)."""
    set_seed(config.seed)
    with bad_input():
        if config.model.init_from is None:
            model_config = build_model_config(config, len(tokenizer), tokenizer.eos_token_id)
            family = family_of(model_config.model_type)
        else:
            where = start.path / "model" if start.path else config.model.init_from
            family, model_config = starting_config(config, where, start.saved)
            check_vocabulary(model_config.vocab_size, len(tokenizer))
            config.check_context(model_config.max_position_embeddings)
        if start.path is not None:
            model = load("resume", family.causal_lm, start.path / "model", dtype=torch.float32)
            for name in NORM_FIELDS:  # the checkpoint's own say where a ramped λ stood then
                setattr(model.config, name, getattr(model_config, name))
        elif config.model.init_from is not None:
            model, lost = load_start(family, config.model.init_from, model_config)
            start.messages.extend([lost] * bool(lost))
        else:
            model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise UserError(f"model: {name} is {parameter.dtype}, must be torch.float32, or its updates round away")
    return model, model_config


def load_start(family: Family, where: str, model_config: Any) -> tuple[PreTrainedModel, str]:
    """The model of a checkpoint with the norms of `model_config`, and a line about what is lost; empty for nothing.

    Raises:
        ValueError: weights that not only the new norms have are missing or not finite, or a file is damaged.
    """
    model, missing, dropped = load_weights("model.init_from", family.causal_lm, where, config=model_config)
    old, norms = norms_of(family, where), norm_prefixes(model)
    had = tuple(f".{site}.{name}" for site, norm in old.items() for name, _ in norm.named_parameters())
    refuse_lost(
        "model.init_from", where, [name for name in missing if not name.startswith(norms) or f".{name}".endswith(had)]
    )
    return model, lost_message(where, dropped, old)


def load_weights(field: str, cls: Any, where: str, **options: Any) -> tuple[PreTrainedModel, list[str], list[str]]:
    """A model of class `cls` in float32; which of its weights `where` has not, and which of `where` it has not.

    Raises:
        UserError, ValueError: a file is damaged, or weights are not finite: every step would be skipped.
    """
    check_model(field, options.get("config") or load(field, AutoConfig, where))
    model, found = load(field, cls, where, dtype=torch.float32, output_loading_info=True, **options)
    if bad := [name for name, value in model.named_parameters() if not value.isfinite().all()]:
        raise ValueError(f"{field}: got {where!r}, whose {bad[0]} has NaN or infinity: {len(bad)} tensors in all")
    missing = {*found["missing_keys"], *map(str, found["mismatched_keys"])}
    return model, sorted(missing), sorted(found["unexpected_keys"])


def refuse_lost(field: str, where: str, lost: list[str]) -> None:
    """Raise ValueError where weights are missing."""
    if lost:
        raise ValueError(f"{field}: got {where!r}, which lacks {', '.join(lost[:5])}: {len(lost)} in all")


def load_teacher(config: TrainConfig, where: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The model to distil, in float32 and eval mode, without gradients.

    Raises:
        ValueError: there is none, it is damaged, or its tokens are not those of the run.
        UserError: its tokenizer cannot be loaded.
    """
    found = read_config("teacher", where)
    if found.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"teacher: got {where!r} with a vocabulary of {found.vocab_size}, the model has {config.model.vocab_size}; "
            "both must be as large"
        )
    if config.block_size > found.max_position_embeddings:
        raise ValueError(
            f"block_size: got {config.block_size}, must be <= the teacher's context of {found.max_position_embeddings}"
        )
    if not Path(where).is_dir() or has_tokenizer(Path(where)):  # on the Hub there is taken to be one
        theirs = saved_and_loaded(load_tokenizer("teacher", where))
        if theirs.backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str():
            raise ValueError(f"teacher: got {where!r}, whose tokenizer is not the run's; ids would mean other tokens")
    model, missing, _ = load_weights("teacher", AutoModelForCausalLM, where)
    refuse_lost("teacher", where, missing)
    return model.eval().requires_grad_(False)


def family_of(model_type: str, field: str = "model.init_from") -> Family:
    """The family that `model_type` belongs to, ours or stock; `field` is what errors call it.

    Raises:
        ValueError: none.
    """
    for family in FAMILIES:
        ours = family.config.model_type
        if model_type in (ours, ours.removeprefix("ibnorm_")):
            return family
    known = ", ".join(family.config.model_type.removeprefix("ibnorm_") for family in FAMILIES)
    raise ValueError(f"{field}: got a {model_type} model, known are {known}, stock or ours")


def read_config(field: str, where: str | Path) -> Any:
    """The Transformers config of a checkpoint, stock or ours.

    Raises:
        ValueError: there is none, or it is of another family.
    """
    final = os.path.join(where, "final")
    if os.path.isdir(final) and not os.path.exists(os.path.join(where, "config.json")):
        raise ValueError(f"{field}: got {str(where)!r}, which holds no model; did you mean {final}?")
    found = load(field, AutoConfig, where)
    family_of(found.model_type, field)
    check_model(field, found, weights=False)
    return found


def starting_config(config: TrainConfig, where: str | Path, saved: dict[str, Any] | None) -> tuple[Family, Any]:
    """Family and config of the checkpoint `where`, with the norms of the run."""
    found = read_config("model.init_from", where)
    family = family_of(found.model_type)
    model = config.model
    norms: dict[str, Any] = {"norm_kwargs": model.norm_kwargs} if model.norm_kwargs else {}
    if model.norm_type is not None:
        norms |= {"norm_type": model.norm_type, "norm_overrides": model.norm_overrides}
    elif saved is not None:
        norms |= {name: saved["model"][name] for name in ("norm_type", "norm_overrides")}
    elif not isinstance(found, family.config):
        norms["norm_type"] = family.config.norm_pin.stock
    if saved is not None and norm_name(norms["norm_type"]) == saved["model"]["norm_type"]:
        # A checkpoint's own say where a ramped λ stood then.
        norms["norm_kwargs"] = {**saved["model"]["norm_kwargs"], **model.norm_kwargs}
    built = load("model.init_from", family.config, where, **norms)
    for name in DROPOUTS[family.config.model_type.removeprefix("ibnorm_")]:
        setattr(built, name, model.dropout)
    return family, built


def scheduled_lams(config: TrainConfig, model: PreTrainedModel, model_config: Any) -> dict[str, tuple[float, float]]:
    """Site → λ at the start of the schedule, where the norm compresses nothing, and at its end; empty without one.

    Raises:
        ValueError: λ is to be ramped and cannot be.
    """
    if config.lam_schedule == "constant":
        return {}
    lams = {}
    for site, norm, end in ramped_norms(model):
        if norm.held is None:
            raise ValueError(f"lam_schedule: got 'linear', but {site} learns its {norm.ramp} (learn_{norm.ramp})")
        lams[site] = (norm.ramp_start, float(end))
    if not lams:
        raise ValueError("lam_schedule: got 'linear', but the model has no IBNorm; must be constant")
    if all(start == end for start, end in lams.values()):
        at = ", ".join(sorted({f"{end:g}" for _, end in lams.values()}))
        where = "--model.norm_kwargs.lam"
        if model_config.norm_overrides:  # which may have it, and take no single option
            where += f", or --model.norm_type {model_config.norm_type} with --model.norm_overrides"
        raise ValueError(
            f"lam_schedule: got 'linear', but lam is to end at {at}, where it starts; name another with {where}"
        )
    return lams


_HASHED = {
    "init_sha": "initial model",
    "tokenizer_sha": "tokenizer",
    "train_sha": "training text",
    "validation_sha": "validation text",
    "teacher_sha": "teacher",
}


def check_finished(config: TrainConfig, run_dir: Path, start: Start, accelerator: Accelerator) -> None:
    """Refuse to call a run finished that was another one.

    Raises:
        UserError: settings differ.
    """
    if start.saved is not None:
        with bad_input():
            if config.model.init_from is None:
                built = build_model_config(config, start.saved["model"]["vocab_size"])
            else:
                built = starting_config(config, run_dir / "final", start.saved)[1]
        check_settings(resolved(config, built), start, None, accelerator, {})


def check_settings(
    config: TrainConfig,
    start: Start,
    checkpoint: Checkpoint | None,
    accelerator: Accelerator,
    hashes: dict[str, str | None],
) -> None:
    """Refuse to go on where the result would not be that of a run never interrupted.

    Raises:
        UserError: settings, text, machine or software differ, or a stream would be dealt out to another number of
            processes.
    """
    processes = accelerator.num_processes
    if start.saved is not None:
        then = checkpoint.state["num_processes"] if checkpoint else _processes_of(Path(config.run_dir), processes)
        now = json.loads(json.dumps(config.as_recipe()))
        if changed := changed_fields(start.saved, now, (then, processes)):
            raise UserError(f"resume: {'; '.join(changed)}; a resumed run keeps its settings")
    if checkpoint is None:
        return
    state = checkpoint.state
    for name, value in hashes.items():
        if value != state["hashes"][name]:
            raise UserError(
                f"resume: the {_HASHED[name]} is not what the run began with ({name}); put it back, or begin a new run"
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


def _processes_of(run_dir: Path, unknown: int) -> int:
    """How many processes a run has begun with."""
    found = _record_of(run_dir)
    return unknown if found is None else int(found["num_processes"])


def _record_of(run_dir: Path) -> dict[str, Any] | None:
    """What `environment.json` of a run says; None where it is missing or damaged: nothing depends on it.

    Raises:
        UserError: it is there and cannot be read.
    """
    try:
        form = {"num_processes": int, "resumed?": list}
        found: dict[str, Any] = read_json("run_dir", run_dir / "environment.json", form)
    except UserError as error:
        if isinstance(error.__cause__, OSError) and not is_absent(error.__cause__):
            raise
        return None
    return found


def norm_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What the names of the norms' parameters begin with."""
    return tuple(f"{name}." for name, module in model.named_modules() if is_norm(module))


def shared_weights_sha(model: nn.Module) -> str:
    """Hash of every parameter that does not belong to a norm: equal for two models that differ in their norms only."""
    norms = norm_prefixes(model)
    return sha256_tensors((name, value) for name, value in model.named_parameters() if not name.startswith(norms))


def check_space(run_dir: Path, model: nn.Module, config: TrainConfig, resumed: bool) -> None:
    """Refuse a run whose checkpoints have no room on the disk.

    Raises:
        UserError: with what is needed and what is free.
    """
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    kept = config.keep_last + 1 if config.checkpoint_every and not resumed else 1
    needed = 3 * weights * kept + 2 * weights  # AdamW has two numbers for each weight; step 0 and the final model none
    with bad_input(OSError):
        check_disk("run_dir", run_dir, needed, " for its checkpoints", "; make room or lower keep_last")


def write_run_files(run_dir: Path, run: Run, accelerator: Accelerator) -> None:
    """Everything about a new run that is known before its first step."""
    write_text(run_dir / "config.yaml", yaml.safe_dump(run.config.as_recipe(), sort_keys=False))
    record = environment_record() | {
        **run.hashes,
        "parameters": sum(parameter.numel() for parameter in run.skeleton.parameters()),
        "flops_per_token": run.flops_per_token,
        "validation_tokens": run.validation.targets,
        "num_processes": accelerator.num_processes,
        "mixed_precision": run.config.mixed_precision,
        "on_hub": names_on_hub(run.config),
        "bos_token_id": run.bos,
    }
    if isinstance(run.train, PackedData):
        packed = run.train.packed
        record |= {"train_tokens": packed.targets, "train_blocks": packed.blocks, "train_padding": packed.padding}
    write_json(run_dir / "environment.json", record)


def names_on_hub(config: TrainConfig) -> list[str]:
    """What the run loads by the name of a repository, NAMESPACE/NAME; elsewhere the same name may be that of a path."""
    names = (config.corpus, config.validation_corpus, config.tokenizer, config.model.init_from, config.teacher)
    return sorted({name for name in names if name and not Path(name).exists() and is_repo(name)})


def note_resume(run_dir: Path, step: int, accelerator: Accelerator) -> None:
    """Add a line about this resume to `environment.json`."""
    path = run_dir / "environment.json"
    now = environment_record() | {"num_processes": accelerator.num_processes}
    record = _record_of(run_dir) or now
    noted = {"step": step, **{name: now[name] for name in ("date", "device", "versions", "num_processes", "command")}}
    write_json(path, {**record, "resumed": [*record.get("resumed", []), noted]})


def save_model(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Save model and tokenizer as one directory that `from_pretrained` loads, whole or not at all."""
    with atomic_directory(path) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        write_manifest(directory)
