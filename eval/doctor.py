"""Checks for what can spoil a score without a word, before a token is generated; each passes or says what to do."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .answers import Prompts
from .mirror import GATED, how_to_access, problems, sets_of
from .suites import VERSION, Benchmark

NEEDED = {
    "leaderboard/ifeval": ("langdetect", "immutabledict", "nltk"),
    "ifeval": ("langdetect", "immutabledict", "nltk"),
    "leaderboard/math": ("sympy", "math_verify", "antlr4"),
    "truthfulqa": ("sacrebleu", "rouge_score"),
}
"""Modules that task files import, beside lm-eval's own."""


@dataclass(frozen=True)
class Check:
    """The outcome of one check: `problem` says what is wrong and what to do, and is None where the check passed.

    A run tells the `detail` of a check that passed only if it is `notable`.
    """

    name: str
    problem: str | None
    detail: str = ""
    notable: bool = False

    @property
    def passed(self) -> bool:
        return self.problem is None


def check_surroundings(benchmarks: Sequence[Benchmark], mirror: Path | None) -> Iterator[Check]:
    """Packages, NLTK's sentence splitter, and the data sets: before any task is loaded."""
    folders = {folder for benchmark in benchmarks for folder in benchmark.folders}
    installed, pip = metadata.version("lm_eval"), "pip install 'hf_ibnorm[eval]'"
    missing = sorted(module for folder in folders for module in NEEDED.get(folder, ()) if find_spec(module) is None)
    problem = f"{', '.join(missing)} not installed: {pip}" if missing else None
    if installed != VERSION:
        problem = f"lm-eval {installed} is installed, scores are defined by {VERSION}: {pip}"
    yield Check("packages", problem, f"lm-eval {installed}")
    if folders & {"leaderboard/ifeval", "ifeval"} and find_spec("nltk"):
        yield _punkt()
    sets = sets_of(benchmarks)
    if mirror is None:
        yield from map(_access, sorted({each.repository for each in sets} & GATED))
        return
    problem, todo = None, f"python -m eval mirror fetch --mirror {mirror}"
    if not mirror.is_dir():
        problem = f"{mirror} is no directory ({todo})"
    elif wrong := problems(mirror, sets):
        problem = f"{wrong[0]} ({len(wrong)} in all): {todo}"
    yield Check("mirror", problem, str(mirror))


def _punkt() -> Check:
    import nltk

    try:
        nltk.tokenize.PunktTokenizer("english")  # a folder of that name may lack the files
        return Check("punkt", None, str(nltk.data.find("tokenizers/punkt_tab/english/")))
    except Exception as error:  # the folder may be missing, or hold anything
        todo = "python -m nltk.downloader punkt_tab, or set NLTK_DATA to a folder that has tokenizers/punkt_tab"
        damage = "" if isinstance(error, LookupError) else f", which cannot be read ({type(error).__name__}: {error})"
        missing = f"IFEval needs NLTK's punkt_tab{damage}"
        return Check("punkt", f"{missing}, and would fail after generating everything: {todo}")


def _access(repository: str) -> Check:
    from huggingface_hub import auth_check
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        auth_check(repository, repo_type="dataset")
    except (GatedRepoError, RepositoryNotFoundError):
        return Check("access", f"{repository} is gated: {how_to_access(repository)}")
    except Exception as error:  # no network: the set may still be in the cache, loading it will tell
        return Check("access", None, f"{repository}: not asked ({type(error).__name__})")
    return Check("access", None, repository)


def check_model(lm: Any) -> Iterator[Check]:
    """The tokenizer, and whether the model's logits are numbers that depend on its input alone."""
    import torch

    yield _tokenizer(lm)
    text = lm.tok_encode("The quick brown fox jumps over the lazy dog, and the five boxing wizards jump quickly.")
    ids = torch.tensor([text[: max(2, lm.max_length // 2)]], device=lm.device)
    with torch.inference_mode():
        alone, again = lm.model(ids).logits.float(), lm.model(ids).logits.float()
    noise = logits = None
    if lm.model.training:
        noise = "the model is in training mode"
    elif not bool(((alone == again) | alone.isnan()).all()):  # NaNs, which equal nothing, are told of below
        noise = "the same input gives different logits: something in the model is random"
    if not bool(alone.isfinite().all()):
        logits = "the model's logits are NaN or infinite"
    elif float((alone.amax(-1) - alone.amin(-1)).max()) <= 1e-5 * float(alone.abs().max()):
        logits = "the model gives every token the same score, it tells nothing apart"
    yield Check("noise", noise)
    yield Check("logits", logits, "finite")
    if not (noise or logits):  # random or infinite logits move whatever stands beside the text
        yield from _padding(lm, ids, alone)


def _tokenizer(lm: Any) -> Check:
    text = "a b"
    bare, whole = lm.tokenizer.encode(text, add_special_tokens=False), lm.tok_encode(text)
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
    if start is None:
        return Check("tokenizer", "its special tokens change how a text is encoded")
    token = lm.tokenizer.convert_ids_to_tokens
    before, after = token(whole[:start]), token(whole[start + len(bare) :])
    if after:
        return Check("tokenizer", f"it ends every text with {after[-1]!r}, only that would score")
    if len(before) > 1:
        return Check("tokenizer", f"it puts {', '.join(map(repr, before))} before every text, one too many")
    return Check("tokenizer", None, f"{before[0]!r} before every text" if before else "adds nothing")


def _padding(lm: Any, ids: Any, alone: Any) -> Iterator[Check]:
    """Logits of one text alone, followed by padding, and beside others: the harness masks nothing."""
    import torch

    n = ids.shape[1]
    tolerance = 1e-4 if alone.dtype == lm.model.dtype else 3e-2  # in half precision kernels differ by shape
    scale = alone.abs().max().clamp_min(1e-6)
    padded = torch.cat([ids, torch.zeros_like(ids[:, : lm.max_length - n])], dim=1)
    several = torch.cat([ids.flip(1), ids, torch.zeros_like(ids)])
    with torch.inference_mode():
        others = {"padding": lm.model(padded).logits[0, :n], "batch_size": lm.model(several).logits[1]}
    for name, logits in others.items():
        moved = float((logits.float() - alone[0]).abs().max() / scale)
        problem = f"a text's logits depend on what is beside it (by {moved:.1g} of the largest): scores would too"
        yield Check(name, None if moved <= tolerance else problem, f"logits move by {moved:.1g} of the largest")


def check_context(
    lm: Any, benchmark: Benchmark, prompts: dict[str, Prompts], overlong: str
) -> tuple[Check, str | None]:
    """Whether a benchmark's prompts fit into the model's context; and why the benchmark is left out, or None.

    Of `overlong`, "refuse" fails, "truncate" lets the harness cut prompts from the left, and "skip" leaves the
    benchmark out. Cutting cannot help where the answer alone does not fit: such a benchmark is left out, too.
    """
    count, longest = sum(each.overlong for each in prompts.values()), max(each.longest for each in prompts.values())
    impossible = next((each.impossible for each in prompts.values() if each.impossible), None)
    title, context = benchmark.title, lm.max_length
    if not count and not impossible:
        return Check("context", None, f"{title}: {longest} of {context} tokens"), None
    too_long = f"{count} prompts are longer than the model's context of {context} tokens, the longest {longest}"
    problem = impossible or too_long
    if overlong == "refuse":
        ways = "--overlong skip leaves it out" + ("" if impossible else ", --overlong truncate cuts them from the left")
        return Check("context", f"{title}: {problem}; {ways}"), None
    if overlong == "truncate" and not impossible:
        return Check("context", None, f"{title}: {count} prompts will be cut to {context} tokens", notable=True), None
    return Check("context", None, f"{title} is left out: {problem}", notable=True), problem


def failures(checks: Iterable[Check], ignored: Sequence[str]) -> list[Check]:
    """The checks that failed and may not."""
    return [check for check in checks if not check.passed and check.name not in ignored]


def outcome(check: Check, ignored: Sequence[str]) -> str:
    """One line on a check."""
    mark = "pass" if check.passed else ("ignored" if check.name in ignored else "FAIL")
    return f"{mark:7} {check.name}: {check.problem or check.detail}".rstrip(": ")
