"""The mtp objective: the same logits are scored on the tokens after the next one too.

    term = (sum of CE(z[t], x[t+2]) + sum of CE(z[t], x[t+3]) / 2) / (number of the first)

z[t] are the logits that predict x[t+1]. Only what the cross entropy scores too is scored, and only
in the document of t. The marker of the next document counts as a document's end. With lambda 0.5
the three tokens count 1, 0.5 and 0.25. No parameter is added, and no pass of the head.
Source: modded-nanogpt pull request 178; with heads of its own, arXiv 2404.19737.

Shapes: R rows of T tokens.
"""

import torch

from nanojepa.objectives.objective import Objective

WEIGHTS = (1.0, 0.5)  # of x[t+2], x[t+3]


class Mtp(Objective):
    compares_vectors = False
    needs_last_layer = True

    def draw(self, batch, rng):
        """targets (2, R, T): x[t+2] and x[t+3], -1 for none."""
        targets = torch.stack([later_targets(batch, n) for n in (1, 2)])
        return {"targets": targets, "weight": (targets[0] >= 0).float()}

    def loss(self, lm, batch, states, drawn):
        return states.new_zeros((), dtype=torch.float32)

    def more_targets(self, batch, drawn):
        # A trainer has divided the weights. All that count are equal, so one stands for all.
        weight = drawn["weight"].amax()
        return drawn["targets"], torch.stack([weight * w for w in WEIGHTS])


def later_targets(batch, n):
    """The targets (R, T) n tokens later in the same document, -1 where there are none."""
    targets = torch.full_like(batch.targets, -1)
    targets[:, :-n] = torch.where(batch.follows(n), batch.targets[:, n:], -1)
    return targets
