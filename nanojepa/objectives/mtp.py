"""The mtp objective: the same logits are scored on the tokens after the next one too.

    term = (sum of CE(z[t], x[t+2]) + sum of CE(z[t], x[t+3]) / 2) / (number of the first)

z[t] are the logits that predict x[t+1]. Only what the cross entropy scores too is scored, and only
in the document of t. The marker of the next document counts as a document's end. With lambda 0.5
the three tokens count 1, 0.5 and 0.25. No parameter is added.
Source: modded-nanogpt pull request 178; with heads of its own, arXiv 2404.19737.

Shapes: R rows of T tokens.
"""

import torch

from nanojepa.objectives.objective import Objective

WEIGHTS = (1.0, 0.5)  # of x[t+2], x[t+3]


class Mtp(Objective):
    needs_last_layer = True

    def __init__(self, options):
        super().__init__(options)
        if (options.distance, options.predictor) != ("cosine", "identity"):
            raise ValueError(
                "the objective mtp compares no vectors: leave its distance and its predictor out"
            )

    def draw(self, batch, rng):
        """targets (2, R, T): x[t+2] and x[t+3], -1 for none."""
        targets = torch.stack([later_targets(batch, n) for n in (1, 2)])
        return {"targets": targets, "weight": (targets[0] >= 0).float()}

    def loss(self, lm, batch, states, drawn):
        losses = [lm.cross_entropy(states, targets) for targets in drawn["targets"]]
        term = sum(weight * loss for weight, loss in zip(WEIGHTS, losses, strict=True))
        # A trainer may have divided the weights. All that count are equal, so one stands for all.
        return drawn["weight"].amax() * term


def later_targets(batch, n):
    """The targets (R, T) n tokens later in the same document, -1 where there are none."""
    targets = torch.full_like(batch.targets, -1)
    targets[:, :-n] = torch.where(batch.follows(n), batch.targets[:, n:], -1)
    return targets
