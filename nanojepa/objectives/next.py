"""The next objective (NextLat): a state and the next token predict the next state.

    p[t]  = h[t] + MLP(norm(e[t+1]), norm(h[t]))
    term  = mean over t of  SmoothL1(h[t+1], p[t]) + KL(logits of h[t+1]; logits of p[t])

h are the states after the final norm, e the embeddings of the tokens. Neither h[t+1] nor the head
gets a gradient; h[t] and e do. SmoothL1 is the mean over the width. The MLP has three matrices,
belongs to the objective, and gives zeros at first. Only t whose next token lies in the same
document count.
Source: arXiv 2511.05963.

Shapes: R rows of T tokens, D width, V vocabulary, N places.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanojepa.objectives.objective import Objective
from nanojepa.objectives.predictors import MLP

PLACES_AT_ONCE = 2048  # of 50,304 tokens, float32 logits take 0.4 GB


class Next(Objective):
    default_normed = True
    compares_vectors = False
    needs_last_layer = True
    more_heads = 1  # two forward passes and half a backward one have the FLOPs of one

    def __init__(self, options):
        super().__init__(options)
        D = options.width
        self.mlp = MLP(2 * D, 2 * D, 2 * D, D)

    def draw(self, batch, rng):
        return {"weight": batch.follows(1).float()}

    def predict(self, lm, idx, h):
        """The next states (R, T - 1, D) of normed ones h (R, T, D)."""
        e, known = lm.embed(idx[:, 1:]).float(), h[:, :-1]
        seen = [F.rms_norm(x, x.shape[-1:], eps=1e-6) for x in (e, known)]
        return known + self.mlp(torch.cat(seen, dim=-1))

    def loss(self, lm, batch, states, drawn):
        h = self.compared(states)
        target, predicted = h[:, 1:].detach(), self.predict(lm, batch.idx, h)
        latent = F.smooth_l1_loss(predicted, target, reduction="none").mean(-1)
        weight = drawn["weight"]
        dtype = states.dtype  # of the head's matrix product
        parts = zip(
            *(x.flatten(0, 1).split(PLACES_AT_ONCE) for x in (target, predicted, weight)),
            strict=True,
        )
        # Logits are computed again in the backward pass, so those of one part are there at a time.
        divergences = [
            checkpoint(divergence, lm, x.to(dtype), y.to(dtype), w, use_reentrant=False)
            for x, y, w in parts
        ]
        return (latent * weight).sum() + sum(divergences)


def divergence(lm, target, predicted, weight):
    """The sum of weight (N,) * KL of two predictions of the next token, from states (N, D)."""
    p, q = (lm.logits(x, frozen=True).log_softmax(-1) for x in (target, predicted))
    return (weight * F.kl_div(q, p, reduction="none", log_target=True).sum(-1)).sum()
