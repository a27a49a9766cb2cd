"""The future objective: each state predicts the mean of the states that follow it.

    term = mean over t of  1 - cos(h[t] + MLP(h[t]), mean(h[t+1] .. h[t+8]) without gradient)

after the final norm, or another distance, over the t whose next eight tokens lie in the same
document. The MLP belongs to the objective, and gives zeros at first. The target is far and coarse,
in the manner of the future summaries of arXiv 2510.14751.

Shapes: R rows of T tokens, D width.
"""

import torch.nn.functional as F

from nanojepa.objectives.distance import Views
from nanojepa.objectives.objective import Objective
from nanojepa.objectives.predictors import MLP

AHEAD = 8  # tokens whose states are averaged


class Future(Objective):
    least_tokens = AHEAD + 1
    default_normed = True  # the longest states would dominate a mean of the stream

    def __init__(self, options):
        super().__init__(options)
        self.mlp = MLP(options.width, 2 * options.width, options.width)

    def draw(self, batch, rng):
        return {"weight": batch.follows(AHEAD).float()}

    def views(self, lm, batch, states, drawn):
        states = self.compared(states)
        # Of tokens t .. t+7, for every t.
        means = F.avg_pool1d(states.detach().mT, AHEAD, stride=1).mT
        states = states[:, :-AHEAD]
        return Views(states + self.mlp(states), means[:, 1:])
