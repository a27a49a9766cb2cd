"""How alike views are that belong together: encoding them, statistics, and a picture.

Shapes: N pairs of views, D width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from nanojepa.files import progress
from nanojepa.objectives import StepRandom
from nanojepa.packing import pack_rows

QUANTILES = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}
SINGULAR_VALUES = 100  # at most, the largest
DRAWN_PAIRS, DRAWN_LINES = 1000, 100


class EncodedViews(NamedTuple):
    """View A and view B (N, D) on the CPU, and the number of each pair's example (N,)."""

    u: torch.Tensor
    v: torch.Tensor
    group: torch.Tensor


@torch.no_grad()
def states_of_views(lm, objective, examples, filler, batch_size):
    """The EncodedViews that an objective compares in these Examples; lm: as its views() takes it.

    filler: the token that fills rows.
    """
    found, device = [], next(lm.model.parameters()).device
    for first in progress(range(0, len(examples), batch_size), "encoding"):
        batch = pack_rows(examples[first : first + batch_size], filler)
        group = first + batch.group[batch.weight > 0]
        batch.drawn = objective.draw(batch, StepRandom(0, 0, batch.items, batch.total_items))
        batch = batch.to(device)
        states = lm.states(batch.idx, batch.positions, batch.ends)
        views = objective.predicted_views(lm, batch, states, batch.drawn)
        counted = batch.drawn["weight"] > 0
        found.append((views.u[counted].cpu(), views.v[counted].cpu(), group))
    return EncodedViews(*map(torch.cat, zip(*found, strict=True)))


def compare_views(u, v, group):
    """The statistics of views A, u (N, D), and views B, v (N, D), both in random order: a dict.

    group (N,): the example that a pair belongs to. A shuffled pair is of two examples.
    linear_map_error: ||U W - V|| / ||V|| for the matrix W that maps view A to view B best, on the
    half of the examples that W is fitted to, and on the other half.
    """
    u, v, group = u.cpu().double(), v.cpu().double(), group.cpu()
    if len(group.unique()) < 2:
        raise ValueError(
            f"{len(group)} pairs of views from {len(group.unique())} examples: a similarity needs "
            "two examples"
        )
    if not (u.isfinite().all() and v.isfinite().all()):
        raise ValueError("the views hold infinities or NaN: the model has diverged")
    shift = len(group) // 2
    of_two = group != group.roll(shift)
    return {
        "matched": summarise(F.cosine_similarity(u, v)),
        "shuffled": summarise(F.cosine_similarity(u, v.roll(shift, 0))[of_two]),
        "pairs": len(group),
        "dimensions": u.size(1),
        "linear_map_error": linear_map_error(u, v, group),
        "singular_values": torch.linalg.svdvals(u - v)[:SINGULAR_VALUES].tolist(),
    }


def summarise(cosines):
    """Mean and quantiles of cosines (N,), float64."""
    levels = torch.tensor(list(QUANTILES.values()), dtype=cosines.dtype)
    quantiles = cosines.quantile(levels).tolist()
    return {"mean": cosines.mean().item(), **dict(zip(QUANTILES, quantiles, strict=True))}


def linear_map_error(u, v, group):
    """The errors of the best matrix on both halves, and how many pairs it is fitted to.

    With fewer of these than dimensions, the error of the fit is 0, whatever the views are.
    """
    examples = group.unique()
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
    # Halves of whole examples: of paraphrases, one half must not know the other's.
    held_out = torch.isin(group, examples[order[: len(examples) // 2]])
    fit = ~held_out
    # gelsd, since views may be linearly dependent
    matrix = torch.linalg.lstsq(u[fit], v[fit], driver="gelsd").solution

    def error(half):
        return ((u[half] @ matrix - v[half]).norm() / v[half].norm().clamp(min=1e-300)).item()

    return {"fit": error(fit), "held_out": error(held_out), "fit_pairs": int(fit.sum())}


def draw_views(path, u, v, statistics):
    """Write a PNG: both views of up to 1,000 pairs by t-SNE, and the singular values of u - v.

    statistics: what compare_views() says of them.
    """
    n = min(DRAWN_PAIRS, len(u))
    points = torch.cat((u[:n], v[:n])).float().cpu().numpy()
    # Views that have all become one vector have no principal components.
    begin = "pca" if points.std(0).any() else "random"
    tsne = TSNE(perplexity=max(1, min(30, n / 4)), init=begin, random_state=0)
    a, b = tsne.fit_transform(points).reshape(2, n, 2)
    figure = Figure(figsize=(11, 5), layout="constrained")
    matched, shuffled = (statistics[name]["mean"] for name in ("matched", "shuffled"))
    figure.suptitle(f"cosine of matched views {matched:.2f}, of shuffled ones {shuffled:.2f}")
    left, right = figure.subplots(1, 2)
    lines = min(n, DRAWN_LINES)
    for start, end in zip(a[:lines], b[:lines], strict=True):
        left.plot(*zip(start, end, strict=True), color="0.7", linewidth=0.6, zorder=1)
    left.scatter(*a.T, s=10, color="tab:blue", label="view A (Text)", zorder=2)
    left.scatter(*b.T, s=10, color="tab:orange", label="view B (Code)", zorder=2)
    left.set(title=f"t-SNE of {n} pairs; lines join {lines} of them", xticks=[], yticks=[])
    left.legend()
    values = statistics["singular_values"]
    right.semilogy(range(1, len(values) + 1), values, marker=".")
    right.set(title="view A - view B", xlabel="index", ylabel="singular value")
    right.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)
