"""Step-JEPA: Step 1 of an answer predicts Step 2, by the same two views as a pair of texts.

The [PRED] tokens continue Step 1 in the trunk, so view A has seen the question too. Step 2 is
encoded alone. A blank line ends a step.
"""

import re
from dataclasses import replace
from typing import NamedTuple

from nanojepa.objectives.pair import Pair

BLANK_LINE = re.compile(r"\r?\n[ \t]*\r?\n\s*")


class Step(Pair):
    without_ways = "fewer than two steps"

    def __init__(self, options):
        # A step closes no turn, so there is no turn's end to count last_token from.
        super().__init__(replace(options, last_token=0))

    def ways(self, texts):
        steps = texts.steps()
        return [tuple(steps)] if steps else []


class StepEnds(NamedTuple):
    first: int  # the character after Step 1 and the blank line that ends it
    second: int  # the character after Step 2 and its blank line


def find_steps(text):
    """The StepEnds of the first two steps of a text, or None if it has fewer."""
    ends = [
        blank.end()
        for blank in BLANK_LINE.finditer(text)
        if text[: blank.start()].strip() and text[blank.end() :].strip()
    ]
    if not ends:
        return None
    return StepEnds(ends[0], ends[1] if len(ends) > 1 else len(text))
