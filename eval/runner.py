"""Running a suite: checks first, then one harness call a benchmark, each written as it ends, so that a stopped run goes
on where it was."""

import json
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.files import alone_in, check_new_directory, sha256
from hf_ibnorm.report.environment import package_versions
from hf_ibnorm.report.tables import score_cell
from hf_ibnorm.swap.loading import find_model

from .answers import Prompts, answer, prompts_of
from .doctor import Check, check_context, check_model, check_surroundings, failures, outcome
from .harness import SEEDS, data_from, load_tasks, task_errors
from .mirror import hashes, sets_of
from .model import fingerprint, generation_config_aside, is_first, load_model, wrap_model
from .options import Settings
from .scoring import ScoringError, score_benchmark
from .store import add_notes, create, is_begun, record_hashes, still_missing, write_result, write_scores
from .suites import Benchmark, own_files


@dataclass(frozen=True)
class Ready:
    """A benchmark whose tasks are loaded and whose prompts are counted; `skipped` says why it is left out."""

    benchmark: Benchmark
    loaded: dict[str, Any]
    prompts: dict[str, Prompts]
    skipped: str | None


def run(
    model: Any,
    suite: str,
    output: str,
    *,
    tokenizer: Any = None,
    check_stop: Callable[[], None] = lambda: None,
    **settings: Any,
) -> dict[str, Any]:
    """Score a model on a suite.

    Args:
        model: directory of a checkpoint with its tokenizer, or of a training run (its `final` is taken), or a name on
            the Hub; or a causal language model of Transformers, or one in lm-eval's HFLM.
        suite: as in `Settings`.
        output: a new directory, or one where the same run was stopped: it goes on there.
        tokenizer: of a model that is given itself.
        check_stop: called before each benchmark; may raise an error that ends the run, where a task file with a bare
            `except` has caught it.
        **settings: the other fields of `Settings`.

    Returns:
        The content of `scores.json`; of several processes the first has it, the others get {}.

    Raises:
        UserError: bad input, a check that failed, or answers that cannot be scored.
    """
    asked = Settings(suite, **settings)
    asked.check()
    target = Path(output)
    begun, first = is_begun(target), is_first()
    if not begun:
        with bad_input():
            check_new_directory("output", target)
    benchmarks = asked.benchmarks()
    lm = _open(model, tokenizer, asked)
    say = partial(Console(quiet=not first).print, highlight=False, markup=False, soft_wrap=True)

    busy = f"output: {target} is in use by another run"
    with _data_sets(asked.mirror) as folder, generation_config_aside(lm) as unused, ExitStack() as stack:
        if first and begun:
            stack.enter_context(alone_in(target, busy))
        identity = _identity(lm, benchmarks, asked, folder)
        missing = still_missing(target, identity) if begun else identity["benchmarks"]
        checks, ready = examine(lm, [each for each in benchmarks if each.name in missing], asked, folder, unused)
        _stop_on_failure(checks, asked.ignore, say)
        notes = [f"ignored: {check.name}: {check.problem}" for check in checks if not check.passed]
        notes += [check.detail for check in checks if check.name == "generation"]
        if first and begun:
            add_notes(target, notes)
        elif first:
            path = str(model) if isinstance(model, str | Path) else lm.model.name_or_path
            create(target, {"model": path, "settings": asdict(asked), "notes": notes, "identity": identity})
            stack.enter_context(alone_in(target, busy))
        for i, each in enumerate(ready, len(benchmarks) - len(ready) + 1):
            check_stop()
            line = _run_benchmark(lm, each, asked, identity, target)
            say(f"{i}/{len(benchmarks)} {each.benchmark.name} {line}")
    if not first:
        return {}
    record_hashes(target)
    return write_scores(target)


def _identity(lm: Any, benchmarks: Sequence[Benchmark], asked: Settings, mirror: Path | None) -> dict[str, Any]:
    """All that the scores of a run depend on."""
    return {
        "suite": asked.suite,
        "benchmarks": [each.name for each in benchmarks],
        "model": fingerprint(lm),
        "prompting": asdict(asked.prompting),
        "overlong": asked.overlong,
        "mirror": hashes(mirror, sets_of(benchmarks)) if mirror else None,
        "include_path": own_files(asked.include_path) if asked.include_path else None,
        "versions": {each: package_versions()[each] for each in ("lm_eval", "transformers", "torch", "hf_ibnorm")},
        "seeds": SEEDS,
    }


def diagnose(model: str, **settings: Any) -> list[Check]:
    """The checks that `run` makes before it lets a model answer, of the same arguments; UserError for bad input."""
    asked = Settings(**settings)
    asked.check()
    benchmarks, lm = asked.benchmarks(), _open(model, None, asked)
    with _data_sets(asked.mirror) as folder, generation_config_aside(lm) as unused:
        return examine(lm, benchmarks, asked, folder, unused)[0]


def examine(
    lm: Any, benchmarks: Sequence[Benchmark], asked: Settings, mirror: Path | None, unused: dict[str, Any]
) -> tuple[list[Check], list[Ready]]:
    """Every check, and the benchmarks that are ready to run; tasks are loaded only if all else is well.

    `unused` are the fields of the model's generation_config that were put aside.
    """
    checks, ready = [*check_surroundings(benchmarks, mirror), *check_model(lm)], []
    sound = not failures(checks, asked.ignore)
    for benchmark in benchmarks if sound else ():
        part = "data"
        try:
            complete, loaded = load_tasks(benchmark)
            part = "prompts"
            prompts = prompts_of(lm, complete, loaded["tasks"], asked.prompting)
        except UserError as error:
            checks.append(Check(part, str(error)))
            continue
        check, reason = check_context(lm, complete, prompts, asked.overlong)
        checks.append(check)
        ready.append(Ready(complete, loaded, prompts, reason))
    written = [task.OUTPUT_TYPE == "generate_until" for each in ready for task in each.loaded["tasks"].values()]
    if unused and any(written):
        fields = ", ".join(f"{name}={str(value)[:40]}" for name, value in unused.items())
        detail = f"not used, for no task asks for it: {fields} (of the model's generation_config)"
        checks.append(Check("generation", None, detail, notable=True))
    return checks, ready


def _stop_on_failure(checks: Sequence[Check], ignored: Sequence[str], say: Callable[[str], None]) -> None:
    """Raise UserError for the first check that failed; where all passed, say what is worth knowing."""
    if failed := failures(checks, ignored):
        more = f" (and {len(failed) - 1} more: python -m eval doctor)" if len(failed) > 1 else ""
        raise UserError(f"{failed[0].name}: {failed[0].problem}{more}")
    for check in checks:
        if check.notable or not check.passed:
            say(outcome(check, ignored))
    say(f"{sum(check.passed for check in checks)} checks passed")


def _open(model: Any, tokenizer: Any, asked: Settings) -> Any:
    """The model in lm-eval's HFLM."""
    if isinstance(model, str | Path):
        lm = load_model(find_model(str(model)), asked.batch_size, asked.device, asked.dtype)
    elif hasattr(model, "loglikelihood"):
        lm = model
    else:
        lm = wrap_model(model, tokenizer, asked.batch_size, asked.device or str(model.device))
    if asked.apply_chat_template and not lm.tokenizer.chat_template:
        raise UserError("apply_chat_template: the tokenizer has no chat template")
    return lm


@contextmanager
def _data_sets(mirror: str | None) -> Iterator[Path | None]:
    folder = None if mirror is None else Path(mirror)
    with tempfile.TemporaryDirectory() as cache, data_from(folder, Path(cache)):
        yield folder


def _run_benchmark(lm: Any, ready: Ready, asked: Settings, identity: dict[str, Any], target: Path) -> str:
    """Run one benchmark and write its result file; returns its score in a few words."""
    if ready.skipped:
        result = {"benchmark": ready.benchmark.name, "skipped": ready.skipped}
    else:
        kept = partial(_cached, folder=Path(asked.cache), identity=identity) if asked.cache else nullcontext
        with bad_input(ScoringError), task_errors(ready.benchmark, "it cannot be answered and scored"):
            result = answer(lm, ready.benchmark, ready.loaded, ready.prompts, asked.prompting, kept)
    if not is_first():
        return ""
    write_result(target, ready.benchmark, result, asked.prompting.stamp(asked.suite))
    if ready.skipped:
        return f"left out: {ready.skipped}"
    with bad_input(ScoringError):
        return score_cell(score_benchmark(ready.benchmark, result))


@contextmanager
def _cached(lm: Any, folder: Path, identity: dict[str, Any]) -> Iterator[Any]:
    """The model with a file that keeps its answers; another model, dtype or harness has another file."""
    from lm_eval.api.model import CacheHook, CachingLM
    from sqlitedict import SqliteDict

    key = sha256([json.dumps([identity["model"], identity["versions"]], sort_keys=True)])[:32]
    path = folder / f"{key}.db"
    with bad_input(OSError, sqlite3.Error, about=f"cache: {path}: "):
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with sqlite3.connect(path) as database:
                database.execute("select name from sqlite_master")
        cached = CachingLM(lm, str(path))
    # lm-eval pickles answers, and whoever can write a pickle can run code here: JSON instead.
    cached.dbdict.close()
    cached.dbdict = SqliteDict(str(path), autocommit=True, encode=json.dumps, decode=json.loads)
    lm.set_cache_hook(cached.get_cache_hook())
    try:
        yield cached
    finally:
        lm.set_cache_hook(CacheHook(None))
        cached.dbdict.close()
