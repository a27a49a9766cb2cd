"""The masked objective: a state of a text with holes predicts the state of the whole text.

    term = mean over t of  1 - cos(g[t] + MLP(g[t]), h[t] without gradient)

after the final norm, or another distance. h are the states of the text. g are those of the same
text with holes, tokens that can't be read. Each row or document draws the share of its holes,
between 0 and a half, and then their places. A state counts if it sees a hole. The MLP belongs to
the objective, and gives zeros at first.
The two passes are those of MIR (arXiv 2606.06888). The term is ours.

Shapes: R rows of T tokens, D width, N regions.
"""

import torch

from nanojepa.objectives.distance import Views
from nanojepa.objectives.objective import Objective
from nanojepa.objectives.predictors import MLP
from nanojepa.objectives.span import text_regions
from nanojepa.packing import document_fragments

LARGEST_SHARE = 0.5  # of the tokens


class Masked(Objective):
    default_normed = True  # the MLP's zeros are added to states of one length
    more_passes = 1

    def __init__(self, options):
        super().__init__(options)
        self.mlp = MLP(options.width, 2 * options.width, options.width)

    def layout(self, texts):
        return text_regions(texts, 2)

    def draw(self, batch, rng):
        blank = draw_blanks(batch, rng)
        return {"blank": blank, "weight": behind_blanks(batch, blank).float()}

    def views(self, lm, batch, states, drawn):
        g = self.compared(lm.states(batch.idx, batch.positions, batch.ends, drawn["blank"]))
        return Views(g + self.mlp(g), self.compared(states).detach())


def draw_blanks(batch, rng):
    """Which tokens (R, T) can't be read. The first of a row of text, or of a region, always can."""
    R, T = batch.idx.shape
    if batch.pairs is None:
        first = torch.arange(R) * T
        last, counted = first + T - 1, torch.ones(R)
    else:  # what layout() has paired
        (first, last), counted = batch.pairs, batch.weight
    share = LARGEST_SHARE * rng.uniform()
    places = first[:, None] + torch.arange(T)
    drawn = rng.uniform(T) < share[:, None]
    drawn &= (places > first[:, None]) & (places <= last[:, None]) & (counted[:, None] > 0)
    blank = torch.zeros(R * T, dtype=torch.bool)
    blank[places[drawn]] = True
    return blank.view(R, T)


def behind_blanks(batch, blank):
    """Which tokens (R, T) see a blank, or are one."""
    # Documents of a row of text see each other if they have no ends.
    document = torch.zeros_like(batch.idx) if batch.ends is None else batch.document
    first, _ = document_fragments(document)
    blanks = blank.cumsum(1)
    return blanks > (blanks - blank.long()).gather(1, first)
