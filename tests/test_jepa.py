"""jepa.py against slow, obvious references and mathematical properties."""
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import jepa

# float32 sums of a handful of terms of size 1: rounding stays a few units of 1.2e-7
TOLERANCE = dict(rtol=1e-5, atol=1e-6)


def naive_views(h, a, b, start, end):
    """The definition, one span at a time, on Python lists."""
    contexts, patches = [], []
    for row in range(h.size(0)):
        for s in range(a.size(1)):
            i, j, p, q = (int(x[row, s]) for x in (a, b, start, end))
            contexts.append([(h[row, i - 1, d] - h[row, p, d]).item() + (h[row, q, d] - h[row, j, d]).item() for d in range(h.size(2))])
            patches.append([(h[row, j, d] - h[row, i - 1, d]).item() for d in range(h.size(2))])
    shape = (*a.shape, h.size(2))
    return torch.tensor(contexts).view(shape), torch.tensor(patches).view(shape)


def naive_cosine_distance(u, v):
    dot, uu, vv = (sum(x * y for x, y in zip(p, q)) for p, q in ((u, v), (u, u), (v, v)))
    return 1 - dot / math.sqrt(uu * vv)


@st.composite
def spans(draw):
    """h and spans with start < a <= b <= end, any documents."""
    B, T, S, D = draw(st.integers(1, 3)), draw(st.integers(3, 24)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    rows = []
    for _ in range(B * S):
        start = draw(st.integers(0, T - 3))
        end = draw(st.integers(start + 2, T - 1))
        a = draw(st.integers(start + 1, end))
        rows.append((a, draw(st.integers(a, end)), start, end))
    h = torch.randn(B, T, D, generator=torch.Generator().manual_seed(draw(st.integers(0, 1000))))
    return h, *torch.tensor(rows).view(B, S, 4).unbind(-1)


def test_span_views_by_hand():
    h = torch.tensor([[[1.0, 0], [2, 1], [5, 1], [4, 7], [0, 3]]])  # h[0] .. h[4]
    context, patch = jepa.span_views(h, torch.tensor([2]), torch.tensor([3]))
    assert patch.tolist() == [[2, 6]]  # h[3] - h[1]
    assert context.tolist() == [[1 - 4, 1 - 4]]  # (h[1] - h[0]) + (h[4] - h[3])
    # cos = (2*-3 + 6*-3) / (sqrt(40) sqrt(18)) = -24 / sqrt(720)
    assert jepa.distance(context, patch, "cosine").item() == pytest.approx(1 + 24 / math.sqrt(720), rel=1e-6)


@given(spans())
@settings(max_examples=100, deadline=None)
def test_span_views_and_loss_match_the_naive_loop(case):
    h, a, b, start, end = case
    context, patch = jepa.span_views(h, a, b, start, end)
    slow_context, slow_patch = naive_views(h, a, b, start, end)
    torch.testing.assert_close(context, slow_context, **TOLERANCE)
    torch.testing.assert_close(patch, slow_patch, **TOLERANCE)
    rows = torch.arange(h.size(0))[:, None]
    torch.testing.assert_close(context + patch, h[rows, end] - h[rows, start], **TOLERANCE)
    u, v = context.flatten(0, 1), patch.flatten(0, 1)
    if min(u.norm(dim=1).min(), v.norm(dim=1).min()) > 1e-3:  # shorter ones lose their digits in the difference itself
        slow = [naive_cosine_distance(p, q) for p, q in zip(u.tolist(), v.tolist())]
        assert jepa.distance(u, v, "cosine").item() == pytest.approx(sum(slow) / len(slow), abs=1e-5)


def test_default_start_and_end_are_the_row():
    h, a, b = torch.randn(2, 9, 4), torch.tensor([3, 1]), torch.tensor([5, 1])
    given_ends = jepa.span_views(h, a, b, torch.zeros(2, dtype=torch.long), torch.full((2,), 8))
    for x, y in zip(jepa.span_views(h, a, b), given_ends):
        assert torch.equal(x, y) and x.shape == (2, 4)


def test_gradients_reach_exactly_the_four_positions_and_both_vectors():
    h = torch.randn(1, 10, 6, requires_grad=True)
    context, patch = jepa.span_views(h, torch.tensor([[4]]), torch.tensor([[6]]), torch.tensor([[1]]), torch.tensor([[8]]))
    context.retain_grad(), patch.retain_grad()
    jepa.distance(context, patch, "cosine").backward()
    assert context.grad.norm() > 0 and patch.grad.norm() > 0
    touched = h.grad[0].norm(dim=1).nonzero().flatten().tolist()
    assert touched == [1, 3, 6, 8]  # start, a-1, b, end


def test_computed_in_float32_under_autocast():
    h = torch.randn(2, 12, 8, dtype=torch.bfloat16)
    a, b = torch.tensor([[3], [4]]), torch.tensor([[5], [9]])
    for kind in jepa.DISTANCES:
        with torch.autocast("cpu", torch.bfloat16):
            views = jepa.span_views(h, a, b)
            d = jepa.distance(*views, kind)
        assert views[0].dtype == d.dtype == torch.float32
        assert d == jepa.distance(*jepa.span_views(h.float(), a, b), kind)


@pytest.mark.parametrize("kind", jepa.DISTANCES)
def test_distances_match_their_formulas(kind):
    u, v = torch.randn(7, 5), torch.randn(7, 5)
    cosines = F.cosine_similarity(u[:, None], v[None], dim=-1)
    per_pair = {"cosine": 1 - cosines.diagonal(), "l2": (u - v).pow(2).sum(1).sqrt(), "mse": (u - v).pow(2).mean(1),
                "infonce": -(cosines / 0.07).log_softmax(1).diagonal()}[kind]
    torch.testing.assert_close(jepa.distance(u, v, kind), per_pair.mean(), **TOLERANCE)
    weight = torch.tensor([0.5, 0, 1, 0.25, 0, 2, 1])
    if kind == "infonce":  # pairs of weight 0 are no negatives
        there = weight > 0
        per_pair = torch.zeros(7).masked_scatter(there, -(cosines[there][:, there] / 0.07).log_softmax(1).diagonal())
    torch.testing.assert_close(jepa.distance(u, v, kind, weight), (per_pair * weight).sum(), **TOLERANCE)


def test_unknown_distance_is_refused():
    with pytest.raises(ValueError, match="cosine, l2, mse, infonce"):
        jepa.distance(torch.ones(1, 2), torch.ones(1, 2), "cos")


@pytest.mark.parametrize("kind", jepa.DISTANCES)
@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_equal_states_give_no_gradient_and_no_nan(kind, noise):
    """A row of one repeated token: all states equal but for rounding, so that both vectors are noise."""
    h = (torch.randn(1, 1, 8) + noise * torch.randn(2, 12, 8)).requires_grad_()
    a, b = torch.tensor([[2], [5]]), torch.tensor([[4], [7]])
    d = jepa.distance(*jepa.span_views(h, a, b), kind, floor=jepa.noise_floor(h, b))
    d.backward()
    assert h.grad.isfinite().all() and h.grad.abs().max() < 1  # a plain cosine similarity gives some 1e5 here
    if kind == "cosine":
        assert d.item() == 1 and not h.grad.any()


def test_a_short_vector_above_the_floor_keeps_its_gradient():
    h = torch.randn(1, 12, 8) + 0.1 * torch.randn(1, 12, 8)
    h[0, 4] = h[0, 1] + 0.005 * h[0, 0].norm() * F.normalize(torch.randn(8), dim=0)  # the patch: 5 thousandths of a state
    h.requires_grad_()
    a, b = torch.tensor([[2]]), torch.tensor([[4]])
    context, patch = jepa.span_views(h, a, b)
    d = jepa.distance(context, patch, "cosine", floor=jepa.noise_floor(h, b))
    assert d.item() == pytest.approx(1 - F.cosine_similarity(context, patch, dim=-1).item(), abs=1e-4) and d.item() != 1
    d.backward()
    assert h.grad.norm() > 1


def fragments_of(row, doc_token):
    """[(first, last)] of the document fragments of a list of tokens, by walking over it."""
    firsts = [i for i, t in enumerate(row) if i == 0 or (doc_token is not None and t == doc_token)]
    return [(p, q - 1) for p, q in zip(firsts, firsts[1:] + [len(row)])]


@given(st.integers(0, 10_000), st.integers(1, 40), st.sampled_from([0.01, 0.3, 0.5, 1.0]), st.integers(1, 4),
       st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.booleans())
@settings(max_examples=200, deadline=None)
def test_spans_stay_inside_one_fragment_and_never_empty_the_context(seed, T, frac, S, marker_rate, by_document):
    g = torch.Generator().manual_seed(seed)
    idx = torch.where(torch.rand(4, T, generator=g) < marker_rate, 9, torch.randint(0, 9, (4, T), generator=g))
    doc = 9 if by_document else None
    a, b, start, end, weight = jepa.sample_spans(idx, g, spans=S, max_span_frac=frac, doc_token=doc)
    for row in range(4):
        fragments = fragments_of(idx[row].tolist(), doc)
        longest = max(q - p + 1 for p, q in fragments)
        for s in range(S):
            i, j, p, q = (int(x[row, s]) for x in (a, b, start, end))
            if longest < 3:
                assert weight[row, s] == 0
                assert all(0 <= x < T for x in (i - 1 if T > 1 else i, j, p, q))
                continue
            L = q - p + 1
            assert weight[row, s] == 1 and (p, q) in fragments and L >= 3
            assert p < i <= j <= q
            assert 1 <= j - i + 1 <= min(max(1, math.floor(frac * L)), L - 2)


def test_length_and_place_are_uniform_and_fragments_are_chosen_by_length():
    row = [9] + [0] * 5 + [9] + [0] * 2 + [9, 9] + [0] * 9  # fragments of 6, 3, 1 and 10 tokens
    n = 40_000
    a, b, start, end, weight = jepa.sample_spans(torch.tensor([row]), torch.Generator().manual_seed(0), spans=n, max_span_frac=0.5, doc_token=9)
    assert weight.sum() == n
    drawn = Counter(zip(start[0].tolist(), (b - a + 1)[0].tolist(), (a - start)[0].tolist()))
    expected = {}
    for first, L in ((0, 6), (6, 3), (10, 10)):  # the one of a single token has no span
        longest = min(max(1, L // 2), L - 2)
        for length in range(1, longest + 1):
            for place in range(1, L - length + 1):
                expected[first, length, place] = L / 19 / longest / (L - length)
    assert sum(expected.values()) == pytest.approx(1) and set(drawn) <= set(expected)
    chi2 = sum((drawn[k] - n * p) ** 2 / (n * p) for k, p in expected.items())
    assert chi2 < len(expected) + 5 * math.sqrt(2 * len(expected))  # mean + 5 standard deviations of chi-squared


def test_spans_of_a_sequence_do_not_depend_on_the_rank_that_holds_it():
    idx = torch.randint(0, 9, (8, 30))
    whole = jepa.sample_spans(idx, torch.Generator().manual_seed(3), spans=2, max_span_frac=0.5, doc_token=0)
    for first in (0, 2, 4, 6):
        part = jepa.sample_spans(idx[first:first + 2], torch.Generator().manual_seed(3), spans=2, max_span_frac=0.5, doc_token=0,
                                 total_rows=8, first_row=first)
        for x, y in zip(whole, part):
            assert torch.equal(x[first:first + 2], y)


def test_spans_differ_between_rows_and_steps():  # one span for the whole batch: FIELD's mistake 9
    idx = torch.zeros(64, 200, dtype=torch.long)
    g = torch.Generator().manual_seed(0)
    draws = [jepa.sample_spans(idx, g, spans=1, max_span_frac=0.5) for _ in range(2)]
    assert len(set(draws[0][0].flatten().tolist())) > 20
    assert not torch.equal(draws[0][0], draws[1][0])


def test_weight_over_the_run():
    weight = lambda p, **k: jepa.jepa_weight(p, 0.2, **k)
    assert weight(0.0) == weight(0.999) == 0.2
    assert weight(0.49, start_frac=0.5) is None and weight(0.5, start_frac=0.5) == 0.2
    assert weight(0.79, end_frac=0.8) == 0.2 and weight(0.8, end_frac=0.8) is None
    assert weight(0.35, start_frac=0.25, warmup_frac=0.2) == pytest.approx(0.1)
    assert weight(0.6, start_frac=0.25, warmup_frac=0.2) == 0.2
    assert jepa.jepa_weight(0.5, 0.0) is None


def test_independent_states_give_1_707():
    """Context and patch share two endpoints with opposite signs: the cosine of independent states is -1/sqrt(2)."""
    h = torch.randn(400, 64, 512, generator=torch.Generator().manual_seed(0))
    spans = jepa.sample_spans(torch.zeros(400, 64, dtype=torch.long), torch.Generator().manual_seed(1), spans=1, max_span_frac=0.5)
    # a - 1 = start or b = end leave one shared endpoint instead of two, so keep to spans inside the row
    inside = ((spans[0] - 1 > spans[2]) & (spans[1] < spans[3])).float()
    d = jepa.distance(*jepa.span_views(h, *spans[:4]), "cosine", inside / inside.sum())
    assert d.item() == pytest.approx(1 + 1 / math.sqrt(2), abs=0.01)  # 400 cosines with a spread of about 0.03


@given(st.integers(1, 12), st.integers(0, 10**6))
def test_effective_rank_of_matrices_of_known_rank(rank, seed):
    """Equal singular values: the rank itself; any others: less, and never below 1. States that don't count change nothing."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(60, rank)))[0] @ np.linalg.qr(rng.normal(size=(12, rank)))[0].T
    h = torch.tensor(np.concatenate((q, rng.normal(size=(4, 12))))).view(2, 32, 12)
    counted = (torch.arange(64) < 60).view(2, 32)
    assert jepa.state_statistics(h, counted)["effective_rank"] == pytest.approx(rank, rel=1e-5)
    s = rng.exponential(size=12) + 1e-3
    u, _, v = np.linalg.svd(rng.normal(size=(64, 12)), full_matrices=False)
    share = s / s.sum()
    h = torch.tensor(u * s @ v).view(1, 64, 12)
    assert jepa.state_statistics(h, torch.ones(1, 64, dtype=torch.bool))["effective_rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)


def test_state_statistics_of_known_states():
    generator = torch.Generator().manual_seed(0)
    everything = torch.ones(4, 100, dtype=torch.bool)
    line = (torch.arange(100)[None, :, None] + 1.0) * torch.randn(4, 1, 32, generator=generator)
    assert jepa.state_statistics(line, everything)["curvature"] == pytest.approx(0, abs=1e-6)
    noise = jepa.state_statistics(torch.randn(4, 100, 512, generator=generator), everything)
    assert noise["curvature"] == pytest.approx(1.5, abs=0.01) and noise["state_cosine"] == pytest.approx(0, abs=0.01)  # cos of neighbouring steps: -1/2
    h = torch.randn(1, 5, 3, generator=generator)
    unit = h[0] / h[0].norm(dim=1, keepdim=True)
    slow = [float(unit[i] @ unit[j]) for i in range(5) for j in range(5) if i != j]
    assert jepa.state_statistics(h, everything[:1, :5])["state_cosine"] == pytest.approx(sum(slow) / 20, rel=1e-5)
