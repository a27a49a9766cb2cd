"""How far two views are apart: the one place to edit for another distance.

Shapes: N pairs of views, D width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

INFONCE_TEMPERATURE = 0.07  # as LLM-JEPA, arXiv 2509.14252


class Views(NamedTuple):
    """What an objective compares: u[i] with v[i], both (..., D).

    floor (...): a vector of this length or shorter counts as zero; None: 0.
    group (...): the example that a pair belongs to. Views of one example are no negatives of each
    other. None: every pair is an example of its own.
    """

    u: torch.Tensor
    v: torch.Tensor
    floor: torch.Tensor | None = None
    group: torch.Tensor | None = None


def cosine(views, counted):
    """1 - cos of each pair (N,)."""
    return 1 - (unit(views.u, views.floor) * unit(views.v, views.floor)).sum(-1)


def l2(views, counted):
    """The norm of each difference (N,)."""
    return torch.linalg.vector_norm(views.u - views.v, dim=-1)


def mse(views, counted):
    """The mean square of each difference (N,)."""
    return (views.u - views.v).square().mean(-1)


def infonce(views, counted):
    """InfoNCE (N,): the cross entropy of choosing v[i] for u[i] among all v of the micro-batch.

    Pairs that don't count, and other pairs of i's own group, are no negatives.
    """
    cosines = unit(views.u, views.floor) @ unit(views.v, views.floor).T
    absent = ~counted.expand(len(counted), -1)
    if views.group is not None:
        absent = absent | (views.group == views.group[:, None])
    itself = torch.eye(len(counted), dtype=torch.bool, device=counted.device)
    scores = cosines.masked_fill(absent & ~itself, -torch.inf) / INFONCE_TEMPERATURE
    return F.cross_entropy(
        scores, torch.arange(len(counted), device=scores.device), reduction="none"
    )


DISTANCES = {"cosine": cosine, "l2": l2, "mse": mse, "infonce": infonce}
ACROSS_PAIRS = {"infonce"}  # these compare pairs with each other, so the micro-batch matters


def distance(kind, views, weight):
    """The sum of weight * distance over the pairs, a 0-dim float32 tensor.

    kind: a key of DISTANCES. weight (...): 0 for a pair that doesn't count. It is computed in
    float32, whatever the autocast.
    """
    with torch.autocast(views.u.device.type, enabled=False):
        u, v = views.u.float().flatten(0, -2), views.v.float().flatten(0, -2)
        weight = weight.flatten()
        floor = u.new_zeros(len(u)) if views.floor is None else views.floor.flatten()
        group = None if views.group is None else views.group.flatten()
        pairs = Views(u, v, floor[:, None], group)
        return (DISTANCES[kind](pairs, weight > 0) * weight).sum()


def unit(u, floor):
    """u (N, D) divided by its length.

    What is no longer than floor (N, 1) becomes zero and gets no gradient.
    """
    squares = u.square().sum(-1, keepdim=True)
    return u * torch.rsqrt(torch.where(squares > floor**2, squares, torch.inf))


def noise_floor(state, dtype):
    """The length (...) under which a difference of states is rounding noise.

    state (..., D): one of the states, as float32; dtype: what it was computed in. Differences
    shorter than 1/1000 of the state's norm (1/256 in bfloat16) have no direction: their cosine
    counts as 0 and gets no gradient. Repeated tokens need that: their states are equal, and the
    gradient of a cosine, 1 / length, would drown every other one.
    """
    resolution = max(1e-3, torch.finfo(dtype).eps / 2)
    return resolution * state.detach().norm(dim=-1)
