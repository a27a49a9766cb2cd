"""Several objectives in one: the sum of their terms, each times its factor."""

import torch
from torch import nn

from nanojepa.objectives.objective import Objective, Options


class Combined(Objective):
    def __init__(self, terms, factors):
        """terms: {name: Objective}. factors: {name: float}."""
        first = next(iter(terms.values()))
        super().__init__(Options(first.options.width))
        self.terms, self.factors = nn.ModuleDict(terms), factors
        self.normed = first.normed
        self.more_passes = sum(term.more_passes for term in terms.values())
        self.more_heads = sum(term.more_heads for term in terms.values())
        # Who says what is encoded and paired in packed rows.
        self.planners = [name for name, term in terms.items() if term.lays_out]

    def paired(self):
        return next((t.paired() for t in self.terms.values() if t.paired()), None)

    def layout(self, texts):
        if len(self.planners) > 1:
            raise ValueError(
                f"the objectives {' and '.join(self.planners)} both lay out packed rows; combine "
                "one of them with others"
            )
        return self.terms[(self.planners or [*self.terms])[0]].layout(texts)

    def draw(self, batch, rng):
        drawn = {}
        for name, term in self.terms.items():
            own = term.draw(batch, rng)
            drawn |= {f"{name}.{key}": value for key, value in own.items()}
        return drawn

    def loss(self, lm, batch, states, drawn):
        return sum(
            factor * term.loss(lm, batch, states, own) for term, factor, own in self.parts(drawn)
        )

    def more_targets(self, batch, drawn):
        parts = [
            (targets, factor * factors)
            for term, factor, own in self.parts(drawn)
            for targets, factors in [term.more_targets(batch, own)]
        ]
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))

    def parts(self, drawn):
        """(objective, its factor, what it drew) of each."""
        for name, term in self.terms.items():
            begin = f"{name}."
            own = {k.removeprefix(begin): x for k, x in drawn.items() if k.startswith(begin)}
            yield term, self.factors[name], own
