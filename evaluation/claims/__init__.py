"""Published claims, tried at small scale: what the paper says, a small experiment, and a verdict that is computed.

    python eval.py ls claims
    python eval.py --claim=<slug>            measures, writes claims/<slug>.json and .svg, and docs/claims.md anew
    python eval.py claims                    judges, draws and describes what is recorded, without measuring

A claim is a file of `evaluation/claims/papers/` that holds a `CLAIM`; nothing else has to know of it. `contract` says
what a claim is, `checks` how it is decided, `running` measures, `record` is the JSON, `drawing` and `page` show it.
"""

import importlib
import pkgutil

from configs.errors import unknown
from evaluation.claims import papers
from evaluation.claims.checks import Check, Comparison, Rule, Verdict, at_least, at_most, equal, less, of, ordered
from evaluation.claims.contract import Claim, ClaimContext, Number, Table, Trained, number
from evaluation.contract import EvaluationError

__all__ = [
    "Check",
    "Claim",
    "ClaimContext",
    "Comparison",
    "Number",
    "Rule",
    "Table",
    "Trained",
    "Verdict",
    "at_least",
    "at_most",
    "equal",
    "get",
    "less",
    "names",
    "number",
    "of",
    "ordered",
    "register",
]

_registered: dict[str, Claim] = {}


def names() -> tuple[str, ...]:
    """The slugs of all claims, sorted; no claim is imported."""
    files = (module.name.replace("_", "-") for module in pkgutil.iter_modules(papers.__path__))
    return tuple(sorted({*files, *_registered}))


def get(slug: str) -> Claim:
    """The claim called `slug`; EvaluationError naming the nearest ones if there is none."""
    if slug in _registered:
        return _registered[slug]
    if slug not in names():
        raise EvaluationError(unknown("claim", slug, names() or ["none"]))
    claim = importlib.import_module(f"{papers.__name__}.{slug.replace('-', '_')}").CLAIM
    if claim.slug != slug:
        raise ValueError(f"the file of claim {slug} defines one called {claim.slug!r}")
    return claim


def register(claim: Claim) -> None:
    """Adds a claim that is no file of `papers/`, as a notebook or a test has it."""
    if claim.slug in names():
        raise ValueError(f"there is a claim {claim.slug!r} already")
    _registered[claim.slug] = claim
