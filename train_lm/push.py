"""`python -m train_lm.push RUN`: a model card for a finished run and, if a repository is named, the model on the Hub.

The card, `README.md` and `loss.png`, is written into `RUN/final`. Only listed files are uploaded: weights as
safetensors, config, tokenizer, card and the model's code; never a pickle.
"""

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from hf_ibnorm.base import layout
from hf_ibnorm.base.command import OneLineParser, quiet_libraries, require_extra, run_command
from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.files import write_text
from hf_ibnorm.base.manifest import MANIFEST
from hf_ibnorm.base.reading import read_json
from hf_ibnorm.data import CORPORA
from hf_ibnorm.report.document import template
from hf_ibnorm.report.plots import plot_losses
from hf_ibnorm.report.runs import Run, read_scores
from hf_ibnorm.report.tables import Table, number_cell, score_cell

from .final import WEIGHTS, among, flaw

FAMILY_NAMES = {"llama": "Llama", "gpt2": "GPT-2"}
COMPUTE_OPTIMAL = 20
"""Tokens per parameter, about, at which a given amount of computation is spent best (Hoffmann et al., 2022)."""
HASHES = ("train_sha", "validation_sha", "tokenizer_sha")
PACKAGES = ("hf_ibnorm", "torch", "transformers", "accelerate", "python")
UPLOADED = (
    *WEIGHTS,
    *("config.json", "generation_config.json", "README.md", "loss.png", "*.py"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
HINTS = {
    401: "log in with `hf auth login`, or set HF_TOKEN",
    403: "this login may not write there",
    404: "no such repository, or HF_ENDPOINT is no Hub",
}


def is_repo(name: str) -> bool:
    """Whether `name` can be that of a repository on the Hub, NAMESPACE/NAME."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def check_repo(field: str, name: str) -> None:
    """Raise ValueError unless `name` can be that of a repository on the Hub."""
    if not is_repo(name):
        raise ValueError(f"{field}: got {name!r}, must be NAMESPACE/NAME of letters, digits, '-', '_' and single '.'")


def push(
    run_dir: Path,
    repo: str | None = None,
    *,
    public: bool = False,
    scores: Path | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Write the card of a finished run into its `final`, and upload that to `repo`, NAMESPACE/NAME, if one is named.

    A repository is made `public` or private; one that exists keeps its visibility, and into a public one nothing is
    pushed without `public`. `scores` is a directory with a `scores.json`, by default `run_dir/scores`, if it is there.

    Raises:
        UserError: the run is not finished, or its model is not whole or not as it was saved, before anything is
            written; or the Hub cannot be reached or refuses, with the card written.
    """
    final = run_dir / layout.FINAL
    with bad_input():
        if repo is not None:
            check_repo("repo", repo)
        run = Run.read(run_dir.absolute())
        if scores is not None:
            run = replace(run, scores=read_scores(scores))
        if problem := flaw(final):
            raise ValueError(f"run: {final} {problem}")
    with bad_input(OSError, about=f"run: {final} cannot be written: "):
        plot_losses([run], final / "loss.png")
        has_code = "auto_map" in read_json("run", final / "config.json")
        write_text(final / "README.md", model_card(run, repo, remote_code=has_code))
    card = f"card: {final / 'README.md'}"
    if repo is None:
        say(f"{card}; nothing is pushed without a repository (--repo)")
        return
    words = ["python", "-m", "train_lm.push", str(run_dir), "--repo", repo]
    words += ["--public"] * public + ([] if scores is None else ["--scores", str(scores)])
    again = shlex.join(words)
    if constants.HF_HUB_OFFLINE:
        say(f"{card}; offline, nothing is pushed; later: {again}")
        return
    say(card)
    try:
        url = _upload(final, repo, public, say)
    except UserError:
        raise
    except Exception as error:  # of the network, the Hub, its answers: each ends in the same way
        raise UserError(
            f"repo: {repo} has not got the model, {_reason(error)}; it is in {final} with its card; again: {again}"
        ) from error
    say(f"pushed: {url}")


def _upload(final: Path, repo: str, public: bool, say: Callable[[str], None]) -> str:
    """Upload in one commit; returns the address of the repository. UserError where it is public against the wish.

    Weights of an earlier push that are not among these are deleted: loading would prefer one whole file to new parts.
    """
    files = {path.name: path for path in sorted(final.iterdir()) if path.is_file() and path.name[0] != "."}
    files.pop(MANIFEST, None)  # hashes of this folder; the Hub has its own
    kept = {name: path for name, path in files.items() if among(name, UPLOADED)}
    if left := sorted(files.keys() - kept.keys()):
        say(f"not pushed: {', '.join(left)} (not among the files that a model needs)")
    disable_progress_bars()
    api = HfApi()
    url = api.create_repo(repo, private=not public, exist_ok=True)
    info = api.model_info(repo)
    if not info.private and not public:
        raise UserError(f"repo: {repo} is public: --public pushes there; the model is in {final} with its card")
    if info.private and public:
        say(f"{repo} was private and stays so; its settings on the Hub can change that")
    names = {file.rfilename for file in info.siblings or []}
    stale = [CommitOperationDelete(name) for name in sorted(names - kept.keys()) if among(name, WEIGHTS)]
    added = [CommitOperationAdd(name, path) for name, path in kept.items()]
    # Not upload_folder, which makes several commits of a large folder: half a model could be loaded in between.
    api.create_commit(repo, [*stale, *added], commit_message="Push model with hf_ibnorm")
    return str(url)


def _reason(error: Exception) -> str:
    """Why the Hub did not take the model, on one line."""
    answer = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
    if isinstance(answer, HfHubHTTPError):
        message = f" ({answer.server_message})" if answer.server_message else ""
        hint = HINTS.get(answer.response.status_code)
        return f"the Hub answered {answer.response.status_code}{message}{f': {hint}' if hint else ''}"
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{constants.ENDPOINT} cannot be used: {type(error).__name__}: {line}"


def model_card(run: Run, repo: str | None = None, remote_code: bool = False) -> str:
    """The card of a finished run: a `README.md`, with YAML front matter, that stands beside the model and `loss.png`.

    The same run gives the same text. Of a path on this machine, such as a corpus came from, it has the last part only.
    `repo`, NAMESPACE/NAME, is where the model is loaded from, None for a directory; with `remote_code`, its code lies
    beside it.
    """
    name = repo.split("/")[-1] if repo else run.name
    model = run.config["model"]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=benchmark,
            dataset_name=benchmark,
            metric_type=row["details"]["metric"],
            metric_value=row["raw"],
        )
        for benchmark, row in (run.scores["benchmarks"].items() if run.scores and not run.scores["smoke"] else ())
        if row["raw"] is not None
    ]
    # Names that the run loaded from the Hub: only where it ran could a name be told from a directory.
    on_hub = run.environment.get("on_hub", [])
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hf_ibnorm", *(norm for _, norm, _ in run.norms())],
        base_model=model["init_from"] if model.get("init_from") in on_hub else None,
        datasets=[run.config["corpus"]] if run.config["corpus"] in on_hub else None,
        model_name=name if results else None,
        eval_results=results or None,
    )

    def named(source: str) -> str:
        """A corpus, tokenizer or checkpoint by its name on the Hub, or by the last part of its path."""
        return _code(source if source in on_hub else re.split(r"[/\\]", source.rstrip("/\\"))[-1])

    filters = {"code": _code, "plain": _plain, "named": named}
    text = template(Path(__file__).with_name("card.md"), autoescape=False, **filters).render(
        name=name, repo=repo, remote_code=remote_code, model=model, norm=_norm, **_facts(run)
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def _facts(run: Run) -> dict[str, Any]:
    """The variables of `card.md` that come from a run."""
    config, environment, last = run.config, run.environment, run.metrics[-1]
    model_type, known = config["model"]["model_type"], environment.get("train_tokens")
    processes = environment.get("num_processes", 1)
    sequences = config["per_device_train_batch_size"] * config["gradient_accumulation_steps"] * processes
    seen = last["tokens"] / environment["parameters"]
    versions = {name: environment["versions"].get(name) for name in PACKAGES}
    notes = run.scores.get("notes", []) if run.scores else []
    path = r"(?<![\w:/.])~?/(?:[^\s/'\"]+/)+([^\s/'\"]*)"  # an absolute one; its last part is group 1
    return {
        "family": FAMILY_NAMES.get(model_type, model_type),
        "config": config,
        "environment": environment,
        "last": last,
        "embedded": config["corpus"] in CORPORA,
        "hashes": ", ".join(f"{layout.HASHES[key]} {_code(sha)}" for key in HASHES if (sha := environment.get(key))),
        "passes": f"{last['tokens'] / known:.2g}" if known else None,
        "processes": processes,
        "sequences": sequences,
        "skipped": sum("skipped" in row for row in run.metrics),
        "duration": _duration(run.seconds()),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "scores": run.scores,
        "table": _score_table(run.scores).markdown() if run.scores else "",
        "notes": [re.sub(path, r"\1", note) for note in notes if not note.startswith("SMOKE")],
        "tokens_per_parameter": f"{seen:.2g}",
        "optimal": COMPUTE_OPTIMAL,
        "undertrained": not config["model"].get("init_from") and seen < COMPUTE_OPTIMAL,
    }


def _score_table(scores: dict[str, Any]) -> Table:
    table = Table(["benchmark", "metric", "score", "normalized", "items"])
    for name, row in scores["benchmarks"].items():
        metric = row["details"]["metric"]
        lower = " (lower is better)" if metric == "bits_per_byte" else ""
        level, items = number_cell(row["normalized"], ".2f"), number_cell(row["n"], ",")
        table.rows.append([_code(name), _code(metric) + lower, score_cell(row), level, items])
    return table


def _norm(name: str, options: dict[str, Any]) -> str:
    """A norm with its options, the choice of its kernels apart."""
    shown = ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in options.items()
        if key != "backend" and value is not None
    )
    return _code(name) + (f" with {_code(shown)}" if shown else "")


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} seconds"


def _code(value: object) -> str:
    """Any text, with backticks or without, as inline code on one line."""
    text = " ".join(str(value).split())
    fence = "`" * (1 + max((len(ticks) for ticks in re.findall("`+", text)), default=0))
    space = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{fence}{space}{text}{space}{fence}"


def _plain(value: object) -> str:
    """Any text on one line, with Markdown's own characters escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&])", r"\\\1", " ".join(str(value).split()))


def _main() -> None:
    parser = OneLineParser(
        prog="train_lm.push",
        description="Write a model card for a finished run into RUN/final and, with --repo, push that to the Hub.",
    )
    parser.add_argument("run", metavar="RUN", help="run directory of train_lm, finished")
    parser.add_argument("--repo", metavar="NAMESPACE/NAME", help="repository to push to (default: only the card)")
    parser.add_argument("--public", action="store_true", help="let everybody see the repository (default: private)")
    parser.add_argument(
        "--scores", metavar="DIR", help="where `python -m eval run` put its scores (default: RUN/scores, if there)"
    )
    arguments = parser.parse_args()
    require_extra("train", "matplotlib")
    if arguments.public and arguments.repo is None:
        raise UserError("public: given without --repo NAMESPACE/NAME")
    quiet_libraries()
    scores = None if arguments.scores is None else Path(arguments.scores)
    push(Path(arguments.run), arguments.repo, public=arguments.public, scores=scores)


def main() -> NoReturn:
    """Write a model card, push a model."""
    run_command(_main, lower="the size of a part, with save_pretrained(max_shard_size=...)")


if __name__ == "__main__":
    main()
