"""What can spoil a score without a word, looked for before a token is generated; a check passes or says what to do."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .answers import Prompts
from .choice import VERSION
from .mirror import GATED, how_to_access, problems, sets_of
from .suites import Benchmark

NEEDED = {
    "leaderboard/ifeval": ("langdetect", "immutabledict", "nltk"),
    "ifeval": ("langdetect", "immutabledict", "nltk"),
    "leaderboard/math": ("sympy", "math_verify", "antlr4"),
    "truthfulqa": ("sacrebleu", "rouge_score"),
}
"""Modules that task files import, beside lm-eval's own."""
PUNKT = "tokenizers/punkt_tab/english/"


@dataclass(frozen=True)
class Check:
    """The outcome of one of `options.CHECKS`.

    Args:
        name: which.
        problem: None where it passed, else what is wrong and what to do.
        detail: what was seen where it passed.
        notable: whether a run says so even where it passed.
    """

    name: str
    problem: str | None
    detail: str = ""
    notable: bool = False

    @property
    def passed(self) -> bool:
        return self.problem is None


def check_surroundings(benchmarks: Sequence[Benchmark], mirror: Path | None) -> list[Check]:
    """Packages, NLTK's sentence splitter, and the data sets: before any task is loaded."""
    folders = {folder for benchmark in benchmarks for folder in benchmark.folders}
    return [_packages(folders), *_punkt(folders), *_data(benchmarks, mirror)]


def _packages(folders: set[str]) -> Check:
    installed = metadata.version("lm_eval")
    pip = "pip install 'hf_ibnorm[eval]'"
    missing = sorted(m for folder in folders for m in NEEDED.get(folder, ()) if find_spec(m) is None)
    if installed != VERSION:
        return Check("packages", f"lm-eval {installed} is installed, scores are defined by {VERSION}: {pip}")
    return Check("packages", f"{', '.join(missing)} not installed: {pip}" if missing else None, f"lm-eval {installed}")


def _punkt(folders: set[str]) -> list[Check]:
    if not folders & {"leaderboard/ifeval", "ifeval"} or find_spec("nltk") is None:
        return []
    import nltk

    try:
        nltk.tokenize.PunktTokenizer("english")  # a folder of that name may lack the files
        return [Check("punkt", None, str(nltk.data.find(PUNKT)))]
    except Exception as error:  # the folder may be missing, or hold anything
        todo = "python -m nltk.downloader punkt_tab, or set NLTK_DATA to a folder that has tokenizers/punkt_tab"
        missing = "IFEval needs NLTK's punkt_tab"
        damage = "" if isinstance(error, LookupError) else f", which cannot be read ({type(error).__name__}: {error})"
        return [Check("punkt", f"{missing}{damage}, and would fail after generating everything: {todo}")]


def _data(benchmarks: Sequence[Benchmark], mirror: Path | None) -> list[Check]:
    if mirror is None:
        return [_access(repository) for repository in sorted({each.repository for each in sets_of(benchmarks)} & GATED)]
    if not mirror.is_dir():
        return [Check("mirror", f"{mirror} is no directory (python -m eval mirror fetch --mirror {mirror})")]
    wrong = problems(mirror, sets_of(benchmarks))
    todo = f"python -m eval mirror fetch --mirror {mirror}"
    return [Check("mirror", f"{wrong[0]} ({len(wrong)} in all): {todo}" if wrong else None, str(mirror))]


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


def check_model(lm: Any) -> list[Check]:
    """The tokenizer, and whether the model's logits are numbers that depend on its input alone."""
    import torch

    checks = [*_tokenizer(lm)]
    ids = torch.tensor([_sample(lm)], device=lm.device)
    with torch.inference_mode():
        alone, again = lm.model(ids).logits.float(), lm.model(ids).logits.float()
        checks += [_noise(lm, alone, again), _logits(alone)]
        if checks[-2].passed and checks[-1].passed:  # random or infinite logits move anyway
            checks += _padding(lm, ids, alone)
    return checks


def _tokenizer(lm: Any) -> Iterable[Check]:
    text = "a b"
    bare, whole = lm.tokenizer.encode(text, add_special_tokens=False), lm.tok_encode(text)
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
    if start is None:
        yield Check("tokenizer", "its special tokens change how a text is encoded")
        return
    before, after = whole[:start], whole[start + len(bare) :]
    token = lm.tokenizer.convert_ids_to_tokens
    if after:
        yield Check("tokenizer", f"it ends every text with {token(after[-1])!r}, only that would score")
    elif len(before) > 1:
        yield Check("tokenizer", f"it puts {', '.join(map(repr, token(before)))} before every text, one too many")
    else:
        yield Check("tokenizer", None, f"{token(before)[0]!r} before every text" if before else "adds nothing")


def _sample(lm: Any) -> list[int]:
    ids = lm.tok_encode("The quick brown fox jumps over the lazy dog, and the five boxing wizards jump quickly.")
    return ids[: max(2, lm.max_length // 2)]


def _noise(lm: Any, alone: Any, again: Any) -> Check:
    if lm.model.training:
        return Check("noise", "the model is in training mode")
    # A NaN equals nothing; the next check names it.
    same = bool(((alone == again) | (alone != alone)).all())
    return Check("noise", None if same else "the same input gives different logits: something in the model is random")


def _logits(alone: Any) -> Check:
    if not bool(alone.isfinite().all()):
        return Check("logits", "the model's logits are NaN or infinite")
    spread = float((alone.amax(-1) - alone.amin(-1)).max())
    if spread <= 1e-5 * float(alone.abs().max()):
        return Check("logits", "the model gives every token the same score, it tells nothing apart")
    return Check("logits", None, "finite")


def _padding(lm: Any, ids: Any, alone: Any) -> Iterable[Check]:
    """Logits of one text alone, followed by padding, and beside others: the harness masks nothing."""
    import torch

    n = ids.shape[1]
    tolerance = 1e-4 if alone.dtype == lm.model.dtype else 3e-2  # in half precision kernels differ by shape
    scale = alone.abs().max().clamp_min(1e-6)
    padded = torch.cat([ids, torch.zeros_like(ids[:, : lm.max_length - n])], dim=1)
    several = torch.cat([ids.flip(1), ids, torch.zeros_like(ids)])
    for name, logits in (("padding", lm.model(padded).logits[0, :n]), ("batch_size", lm.model(several).logits[1])):
        moved = float((logits.float() - alone[0]).abs().max() / scale)
        problem = f"a text's logits depend on what is beside it (by {moved:.1g} of the largest): scores would too"
        yield Check(name, None if moved <= tolerance else problem, f"logits move by {moved:.1g} of the largest")


def check_context(
    lm: Any, benchmark: Benchmark, prompts: dict[str, Prompts], overlong: str
) -> tuple[Check, str | None]:
    """Whether a benchmark's prompts fit into the model's context.

    Args:
        lm: the model.
        benchmark: named in the check.
        prompts: of its tasks.
        overlong: "refuse" fails, "truncate" lets the harness cut prompts from the left, "skip" leaves the benchmark
            out. Cutting cannot help where the answer alone does not fit: such a benchmark is left out, too.

    Returns:
        The check, and why the benchmark is left out, or None.
    """
    count, longest = sum(each.overlong for each in prompts.values()), max(each.longest for each in prompts.values())
    hopeless = next((each.impossible for each in prompts.values() if each.impossible), None)
    title, context = benchmark.title, lm.max_length
    if not count and not hopeless:
        return Check("context", None, f"{title}: {longest} of {context} tokens"), None
    problem = (
        hopeless or f"{count} prompts are longer than the model's context of {context} tokens, the longest {longest}"
    )
    if overlong == "refuse":
        ways = "--overlong skip leaves it out" + ("" if hopeless else ", --overlong truncate cuts them from the left")
        return Check("context", f"{title}: {problem}; {ways}"), None
    if overlong == "truncate" and not hopeless:
        return Check("context", None, f"{title}: {count} prompts will be cut to {context} tokens", notable=True), None
    return Check("context", None, f"{title} is left out: {problem}", notable=True), problem


def failures(checks: Iterable[Check], ignored: Sequence[str]) -> list[Check]:
    """The checks that failed and may not."""
    return [check for check in checks if not check.passed and check.name not in ignored]


def outcome(check: Check, ignored: Sequence[str] = ()) -> str:
    """One line on a check."""
    mark = "pass" if check.passed else ("ignored" if check.name in ignored else "FAIL")
    return f"{mark:7} {check.name}: {check.problem or check.detail}".rstrip(": ")
