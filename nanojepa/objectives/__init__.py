"""The terms that may be added to the cross entropy. A new one is a file here and a line below."""

from dataclasses import dataclass
from typing import Annotated

from nanojepa.objectives.combined import Combined
from nanojepa.objectives.future import Future
from nanojepa.objectives.masked import Masked
from nanojepa.objectives.masked_ce import MaskedCe
from nanojepa.objectives.mtp import Mtp
from nanojepa.objectives.next import Next
from nanojepa.objectives.objective import Objective, Options, StepRandom
from nanojepa.objectives.pair import Pair
from nanojepa.objectives.span import Span
from nanojepa.objectives.step import Step

OBJECTIVES = {
    "span": Span,
    "pair": Pair,
    "step": Step,
    "future": Future,
    "masked": Masked,
    "next": Next,
    "mtp": Mtp,
    "masked_ce": MaskedCe,
}

__all__ = ["OBJECTIVES", "Objective", "Options", "StepRandom", "Terms", "kinds", "make_objective"]


def read_terms(text):
    """{name: factor} of one objective, or of several as masked,mtp:0.5; ValueError says why not."""
    terms = {}
    for item in text.split(","):
        name, _, factor = item.strip().partition(":")
        if name not in OBJECTIVES:
            *others, last = OBJECTIVES
            raise ValueError(f"must be {', '.join(others)} or {last}, or several as masked,mtp:0.5")
        if name in terms:
            raise ValueError(f"names {name} twice")
        try:
            terms[name] = float(factor or 1)
        except ValueError:
            raise ValueError(f"the factor of {name} is no number") from None
        if not 0 < terms[name] < float("inf"):
            raise ValueError(f"the factor of {name} must be above 0")
    return terms


@dataclass(frozen=True)
class IsTerms:
    """The rule of a setting that names one objective or several."""

    def wrong(self, value):
        try:
            read_terms(value)
        except ValueError as e:
            return str(e)
        return ""


Terms = Annotated[str, IsTerms()]  # the type of such a setting


def kinds(text):
    """The classes of the objectives that a setting names."""
    return [OBJECTIVES[name] for name in read_terms(text)]


def make_objective(text, options):
    """The Objective that a setting names; ValueError if it would not use one of the Options."""
    factors = read_terms(text)
    plain = (options.distance, options.predictor) == (Options.distance, Options.predictor)
    if not plain and not any(kind.compares_vectors for kind in kinds(text)):
        raise ValueError(
            f"the objective {text} compares no vectors: leave its distance and its predictor out"
        )
    terms = {name: OBJECTIVES[name](options) for name in factors}
    if factors == {text: 1.0}:
        return terms[text]
    return Combined(terms, factors)
