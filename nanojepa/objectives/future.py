"""The future objective: each state predicts the mean of the states that follow it.

    term = mean over t of  1 - cos(h[t] + MLP(h[t]), mean(h[t+1] .. h[t+8]) without gradient)

after the final norm, or another distance, over the t whose next eight tokens lie in the same
document. The MLP belongs to the objective, and gives zeros at first. The target is far and coarse,
in the manner of the future summaries of arXiv 2510.14751.

Shapes: R rows of T tokens, D width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanojepa.objectives.distance import Views
from nanojepa.objectives.objective import Objective

AHEAD = 8  # tokens whose states are averaged


class Future(Objective):
    least_tokens = AHEAD + 1
    default_normed = True  # the longest states would dominate a mean of the stream

    def __init__(self, options):
        super().__init__(options)
        self.mlp = ResidualMLP(options.width)

    def draw(self, batch, rng):
        return {"weight": batch.follows(AHEAD).float()}

    def views(self, lm, batch, states, drawn):
        states = self.compared(states)
        # Of tokens t .. t+7, for every t.
        means = F.avg_pool1d(states.detach().mT, AHEAD, stride=1).mT
        return Views(self.mlp(states[:, :-AHEAD]), means[:, 1:])


class ResidualMLP(nn.Module):
    """x + a two-layer MLP of the normed x. The MLP gives zeros at first."""

    def __init__(self, width):
        super().__init__()
        self.fc = nn.Parameter(torch.randn(2 * width, width) * 0.5 * width**-0.5)
        self.proj = nn.Parameter(torch.zeros(width, 2 * width))

    def forward(self, x):
        inner = F.linear(F.rms_norm(x, x.shape[-1:], eps=1e-6), self.fc.to(x.dtype))
        return x + F.linear(F.relu(inner).square(), self.proj.to(x.dtype))
