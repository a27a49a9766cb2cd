"""The numbers of the diagnostics, on states whose numbers are known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanojepa.diagnostics import state_statistics
from nanojepa.objectives import Options
from nanojepa.objectives.distance import distance
from nanojepa.objectives.objective import StepRandom
from nanojepa.objectives.span import Span
from nanojepa.packing import Batch


@given(st.integers(1, 12), st.integers(0, 10**6))
def test_effective_rank_of_matrices_of_known_rank(rank, seed):
    """Equal singular values give the rank itself, others less. Uncounted states change nothing."""
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(60, rank)))
    right, _ = np.linalg.qr(rng.normal(size=(12, rank)))
    h = torch.tensor(np.concatenate((left @ right.T, rng.normal(size=(4, 12))))).view(2, 32, 12)
    counted = (torch.arange(64) < 60).view(2, 32)
    assert state_statistics(h, counted)["effective_rank"] == pytest.approx(rank, rel=1e-5)
    singular = rng.exponential(size=12) + 1e-3
    u, _, v = np.linalg.svd(rng.normal(size=(64, 12)), full_matrices=False)
    part = singular / singular.sum()
    expected = np.exp(-(part * np.log(part)).sum())
    h, everything = torch.tensor(u * singular @ v)[None], torch.ones(1, 64, dtype=torch.bool)
    assert state_statistics(h, everything)["effective_rank"] == pytest.approx(expected, rel=1e-5)


def test_curvature_of_a_line_is_0_and_of_independent_states_1_5():
    generator = torch.Generator().manual_seed(0)
    everything = torch.ones(4, 100, dtype=torch.bool)
    line = torch.arange(1.0, 101)[None, :, None] * torch.randn(4, 1, 32, generator=generator)
    assert state_statistics(line, everything)["curvature"] == pytest.approx(0, abs=1e-6)
    noise = state_statistics(torch.randn(4, 100, 512, generator=generator), everything)
    # The cosine of neighbouring steps is -1/2; the mean of 392 has a standard error of 0.002.
    assert noise["curvature"] == pytest.approx(1.5, abs=0.01)
    assert noise["state_cosine"] == pytest.approx(0, abs=0.01)


def test_state_cosine_is_the_mean_over_pairs():
    h = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0))
    unit = h[0] / h[0].norm(dim=1, keepdim=True)
    cosines = [float(unit[i] @ unit[j]) for i in range(5) for j in range(5) if i != j]
    found = state_statistics(h, torch.ones(1, 5, dtype=torch.bool))["state_cosine"]
    assert found == pytest.approx(sum(cosines) / 20, rel=1e-5)


def test_the_span_term_of_independent_states_is_1_707():
    """Context and patch share two states with opposite signs: their cosine is -1/sqrt(2)."""
    h = torch.randn(400, 64, 512, generator=torch.Generator().manual_seed(0))
    idx, items = torch.zeros(400, 64, dtype=torch.int64), torch.arange(400)
    objective = Span(Options(width=512))
    batch = Batch(idx, idx, document=idx, items=items)
    drawn = objective.draw(batch, StepRandom(1, 0, items, 400))
    before, b, start, end = drawn["places"]
    # Where a - 1 is start or b is end, only one state is shared.
    inside = ((before > start) & (b < end)).float()
    views = objective.views(None, batch, h, drawn)
    mean = distance("cosine", views, inside / inside.sum()).item()
    # some 400 cosines with a spread of 0.03 each
    assert mean == pytest.approx(1 + 1 / math.sqrt(2), abs=0.01)
