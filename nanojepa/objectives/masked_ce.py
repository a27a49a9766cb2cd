"""The masked_ce objective: the next tokens of a text, from a text with holes.

    term = mean over the targets of the cross entropy of a text with holes

The holes are drawn as in masked.py. Every target counts, that of a hole too.
Source: MIR, arXiv 2606.06888. Its weight is 0.4, and its holes have a token id of their own.

Shapes: R rows of T tokens.
"""

from nanojepa.objectives.masked import draw_blanks
from nanojepa.objectives.objective import Objective
from nanojepa.objectives.span import text_regions


class MaskedCe(Objective):
    compares_vectors = False
    needs_last_layer = True
    more_passes = more_heads = 1

    def layout(self, texts):
        return text_regions(texts, 2)

    def draw(self, batch, rng):
        return {"blank": draw_blanks(batch, rng), "weight": (batch.targets >= 0).float()}

    def loss(self, lm, batch, states, drawn):
        states = lm.states(batch.idx, batch.positions, batch.ends, drawn["blank"])
        # All weights that count are equal, so one stands for all.
        weight = drawn["weight"].amax()[None]
        return lm.cross_entropies(states, batch.targets[None], weight)[0]
