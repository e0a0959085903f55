"""`python -m train_lm.push RUN`: a model card for a finished run and, if a repository is named, the model on the Hub.

The card, `README.md` and `loss.png`, is written into `RUN/final`. Only listed files are uploaded: weights as
safetensors, config, tokenizer, card and the model's code; never a pickle.
"""

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from hf_ibnorm.base import layout
from hf_ibnorm.base.command import OneLineParser, quiet_libraries, require_extra, run_command
from hf_ibnorm.base.errors import UserError, bad_input
from hf_ibnorm.base.files import write_text
from hf_ibnorm.base.manifest import MANIFEST
from hf_ibnorm.base.reading import read_json
from hf_ibnorm.report.plots import plot_losses
from hf_ibnorm.report.runs import Run, read_scores

from .card import model_card
from .final import WEIGHTS, among, flaw

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
    """Write the card of a finished run into its `final`, and upload that.

    Args:
        run_dir: run directory of train_lm.
        repo: repository, NAMESPACE/NAME, made where there is none; None for the card only.
        public: whether everybody may see the repository. One that exists keeps its visibility, and into a public one
            nothing is pushed without this.
        scores: directory with a `scores.json`; None for `run_dir/scores`, if there is any.
        say: gets a line about each thing done.

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
        say(f"not pushed: {', '.join(left)} (not among what a model needs)")
    disable_progress_bars()
    api = HfApi()
    url = api.create_repo(repo, private=not public, exist_ok=True)
    info = api.model_info(repo)
    if not info.private and not public:
        raise UserError(f"repo: {repo} is public: --public pushes there; the model is in {final} with its card")
    if info.private and public:
        say(f"{repo} was private and stays so; its settings on the Hub can change that")
    names = {each.rfilename for each in info.siblings or []}
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
