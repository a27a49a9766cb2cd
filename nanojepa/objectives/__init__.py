"""The terms that may be added to the cross entropy. A new one is a file here and a line below."""

from nanojepa.objectives.future import Future
from nanojepa.objectives.mtp import Mtp
from nanojepa.objectives.objective import Objective, Options, StepRandom
from nanojepa.objectives.pair import Pair
from nanojepa.objectives.span import Span
from nanojepa.objectives.step import Step

OBJECTIVES = {"span": Span, "pair": Pair, "step": Step, "future": Future, "mtp": Mtp}

__all__ = ["OBJECTIVES", "Objective", "Options", "StepRandom"]
