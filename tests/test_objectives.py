"""Every objective's vectors, draws and distances against slow, obvious references."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanojepa.objectives import OBJECTIVES, Options, StepRandom, make_objective
from nanojepa.objectives.distance import DISTANCES, Views, distance, noise_floor
from nanojepa.objectives.schedule import jepa_weight, keeps_term
from nanojepa.objectives.span import place_spans
from nanojepa.objectives.step import find_steps
from nanojepa.packing import Batch, Document, Texts, View

# float32 sums of a handful of terms of size 1: rounding stays a few units of 1.2e-7
TOLERANCE = dict(rtol=1e-5, atol=1e-6)
Span, Pair, Step = (OBJECTIVES[name] for name in ("span", "pair", "step"))


def mean_distance(kind, u, v, **more):
    return distance(kind, Views(u, v, **more), torch.full((len(u),), 1 / len(u)))


def span_views(h, places):
    """The context and patch of spans a, b, start, end, each (B, S), within the rows of h."""
    rows = torch.arange(len(h))[:, None] * h.size(1)
    a, b, start, end = (rows + x for x in places)
    drawn = {"places": torch.stack((a - 1, b, start, end))}
    return Span(Options(width=h.size(2))).views(None, None, h, drawn)


# ---- span


@st.composite
def spans(draw):
    """h and spans with start < a <= b <= end, any documents."""
    B, T, S = draw(st.integers(1, 3)), draw(st.integers(3, 24)), draw(st.integers(1, 3))
    rows = []
    for _ in range(B * S):
        start = draw(st.integers(0, T - 3))
        end = draw(st.integers(start + 2, T - 1))
        a = draw(st.integers(start + 1, end))
        rows.append((a, draw(st.integers(a, end)), start, end))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    h = torch.randn(B, T, draw(st.integers(1, 5)), generator=generator)
    return h, torch.tensor(rows).view(B, S, 4).unbind(-1)


def test_span_views_by_hand():
    h = torch.tensor([[[1.0, 0], [2, 1], [5, 1], [4, 7], [0, 3]]])  # h[0] .. h[4]
    places = [torch.tensor([[n]]) for n in (2, 3, 0, 4)]
    views = span_views(h, places)
    assert views.v.tolist() == [[[2, 6]]]  # h[3] - h[1]
    assert views.u.tolist() == [[[1 - 4, 1 - 4]]]  # (h[1] - h[0]) + (h[4] - h[3])
    # cos = (2*-3 + 6*-3) / (sqrt(40) sqrt(18)) = -24 / sqrt(720)
    expected = 1 + 24 / math.sqrt(720)
    assert mean_distance("cosine", views.u, views.v).item() == pytest.approx(expected, rel=1e-6)


@given(spans())
@settings(max_examples=100, deadline=None)
def test_span_views_match_the_naive_loop(case):
    h, places = case
    context, patch, _, _ = span_views(h, places)
    for row in range(h.size(0)):
        for s in range(context.size(1)):
            a, b, start, end = (int(x[row, s]) for x in places)
            for d in range(h.size(2)):
                x = [h[row, t, d].item() for t in range(h.size(1))]
                before, after = x[a - 1] - x[start], x[end] - x[b]
                assert context[row, s, d].item() == pytest.approx(before + after, abs=1e-5)
                assert patch[row, s, d].item() == pytest.approx(x[b] - x[a - 1], abs=1e-5)


def test_gradients_reach_exactly_the_four_positions_and_both_vectors():
    h = torch.randn(1, 10, 6, requires_grad=True)
    context, patch, _, _ = span_views(h, [torch.tensor([[n]]) for n in (4, 6, 1, 8)])
    context.retain_grad(), patch.retain_grad()
    mean_distance("cosine", context, patch).backward()
    assert context.grad.norm() > 0 and patch.grad.norm() > 0
    touched = h.grad[0].norm(dim=1).nonzero().flatten().tolist()
    assert touched == [1, 3, 6, 8]  # start, a-1, b, end


def fragments_of(row, doc_token):
    """[(first, last)] of the document fragments of a list of tokens, by walking over it."""
    firsts = [i for i, t in enumerate(row) if i == 0 or (doc_token is not None and t == doc_token)]
    return [(p, q - 1) for p, q in zip(firsts, firsts[1:] + [len(row)], strict=True)]


def draw_spans(idx, seed=0, step=0, first_row=0, total_rows=None, doc_token=None, **options):
    """Spans of rows of text: a, b, start, end within their row, and weight, each (B, S)."""
    B, T = idx.shape
    items = torch.arange(first_row, first_row + B)
    rng = StepRandom(seed, step, items, total_rows or B)
    document = torch.zeros_like(idx) if doc_token is None else (idx == doc_token).cumsum(1)
    batch = Batch(idx, idx, document=document, items=items)
    drawn = Span(Options(width=1, **options)).draw(batch, rng)
    before, b, start, end = drawn["places"] - torch.arange(B)[:, None] * T
    return before + 1, b, start, end, drawn["weight"]


@given(
    st.integers(0, 10_000),
    st.integers(1, 40),
    st.sampled_from([0.01, 0.3, 0.5, 1.0]),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_spans_stay_inside_one_fragment_and_never_empty_the_context(
    seed, T, frac, S, marker_rate, by_document
):
    g = torch.Generator().manual_seed(seed)
    markers = torch.rand(4, T, generator=g) < marker_rate
    idx = torch.where(markers, 9, torch.randint(0, 9, (4, T), generator=g))
    doc = 9 if by_document else None
    a, b, start, end, weight = draw_spans(idx, seed, spans=S, max_span_frac=frac, doc_token=doc)
    for row in range(4):
        fragments = fragments_of(idx[row].tolist(), doc)
        usable = [f for f in fragments if f[1] - f[0] >= 2]
        for s in range(S):
            assert weight[row, s] == bool(usable)
            if not usable:
                continue
            i, j, p, q = (int(x[row, s]) for x in (a, b, start, end))
            L = q - p + 1
            assert (p, q) in usable and p < i <= j <= q
            assert j - i + 1 <= min(max(1, math.floor(frac * L)), L - 2)


def test_fragments_lengths_and_places_are_drawn_as_documented():
    """Fragments in proportion to their tokens; lengths uniform; places uniform given the length."""
    row = [9, 1, 1, 1, 1, 1, 9, 1, 1, 9, 1]  # fragments of 6, 3 and 2 tokens; the last has no span
    idx = torch.tensor([row]).expand(4000, -1)
    a, b, start, _, _ = draw_spans(idx, spans=2, max_span_frac=0.5, doc_token=9)
    firsts = Counter(start.flatten().tolist())
    assert set(firsts) == {0, 6}
    # 8,000 draws: the standard deviation of a share is under 0.6%, and 3% is five of them
    assert firsts[0] / 8000 == pytest.approx(6 / 9, abs=0.03)
    lengths = Counter((b - a + 1)[start == 0].tolist())
    assert set(lengths) == {1, 2, 3}
    assert all(n / firsts[0] == pytest.approx(1 / 3, abs=0.03) for n in lengths.values())
    places = Counter(a[(start == 0) & (b - a == 1)].tolist())
    assert set(places) == {1, 2, 3, 4}
    assert all(n / lengths[2] == pytest.approx(1 / 4, abs=0.05) for n in places.values())


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_spans_of_a_row_depend_on_neither_ranks_nor_micro_batches(parts, rows, step):
    idx = torch.randint(0, 9, (parts * rows, 12), generator=torch.Generator().manual_seed(step))
    whole = draw_spans(idx, 5, step, spans=2, doc_token=9)
    for part, own in enumerate(idx.split(rows)):
        drawn = draw_spans(own, 5, step, part * rows, len(idx), spans=2, doc_token=9)
        for x, y in zip(drawn, whole, strict=True):
            assert torch.equal(x, y[part * rows : (part + 1) * rows])


def test_every_step_and_seed_draws_anew_and_every_call_too():
    idx = torch.zeros(1, 200, dtype=torch.long)
    assert len({draw_spans(idx, seed, step)[0].item() for seed in (1, 2) for step in (0, 1)}) == 4
    rng = StepRandom(0, 0, torch.arange(3), 3)
    assert not torch.equal(rng.uniform(2), rng.uniform(2))


def test_a_region_of_a_packed_example_gets_its_spans():
    """In packed rows spans are drawn between the places that the layout names."""
    texts = Texts(
        [Document(list(range(9)), range(1, 9)), Document([1, 2], range(1, 2))],
        regions=[((0, 2), (0, 7)), ((1, 0), (1, 1))],
    )
    example = Span(Options(width=1)).layout(texts)
    assert example.pairs == [((0, 2), (0, 7))] and not example.no_term
    short = Span(Options(width=1)).layout(replace(texts, regions=texts.regions[1:]))
    assert short.pairs == [] and "fewer than 3 tokens" in short.no_term
    batch = Batch(
        torch.zeros(2, 12),
        None,
        pairs=torch.tensor([[2, 14, 0], [7, 19, 0]]),
        weight=torch.tensor([1.0, 1, 0]),
        items=torch.tensor([0, 1, 0]),
    )
    drawn = Span(Options(width=1, spans=5)).draw(batch, StepRandom(0, 0, batch.items, 2))
    before, b, start, end = drawn["places"][:, :2]
    assert (start == batch.pairs[0, :2, None]).all() and (end == batch.pairs[1, :2, None]).all()
    assert ((start <= before) & (before < b) & (b <= end)).all()
    assert drawn["weight"].tolist() == [[1.0] * 5, [1.0] * 5, [0.0] * 5]


def test_place_spans_over_its_whole_range():
    """The smallest and the largest uniform numbers stay inside."""
    for L in range(3, 9):
        start, end = torch.tensor([4]), torch.tensor([4 + L - 1])
        for first in (0.0, 1 - 2**-53):
            for second in (0.0, 1 - 2**-53):
                uniform = torch.tensor([[first, second]], dtype=torch.float64)
                a, b = place_spans(uniform, start, end, 1.0)
                assert start < a <= b <= end and (b - a + 1) <= L - 2


# ---- pair and step: what is laid out


def example_texts(**changes):
    """A pair whose Text is 1, 2 and whose Code is 5, 6, 7; marker 0, separator 9."""
    trunk = [0, 1, 2, 9, 5, 6, 7, 0]
    a, b = View([0, 1, 2], 1, [9], document=0), View([0, 5, 6, 7], 1, [0])
    steps = [View([0, 1, 2, 9, 5], 4, document=0), View([0, 6, 7], 1)]
    texts = Texts([Document(trunk, range(1, 8))], [(a, b)], longest=8, steps=lambda: steps)
    return replace(texts, **changes)


def views_of(example):
    """What each side of each pair has seen, in order: lists of tokens."""

    def seen(place):
        document, token = example.documents[place[0]], place[1]
        path = document.trunk
        if document.branch:
            path = document.trunk[: document.fork + 1] + document.branch
            if token <= document.fork:
                path = document.trunk
        return path[: token + 1]

    return [(seen(a), seen(b)) for a, b in example.pairs]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, ([0, 1, 2], [0, 5, 6, 7])),
        ({"preds": (20, 21)}, ([0, 1, 2, 20, 21], [0, 5, 6, 7])),
        ({"preds": (20,), "front": True}, ([0, 20, 1, 2], [0, 5, 6, 7])),
        ({"preds": (20,), "reverse": True}, ([0, 5, 6, 7, 20], [0, 1, 2])),
        ({"preds": (20,), "last_token": -1}, ([0, 1, 2, 20, 9], [0, 5, 6, 7, 0])),
        ({"preds": (20,), "last_token": -2}, ([0, 1, 2, 20], [0, 5, 6, 7])),
        ({"preds": (20,), "last_token": -3}, ([0, 1, 2], [0, 5, 6])),
        ({"last_token": -1}, ([0, 1, 2, 9], [0, 5, 6, 7, 0])),
    ],
)
def test_what_each_view_of_a_pair_has_seen(options, expected):
    example = Pair(Options(width=1, **options)).layout(example_texts())
    assert views_of(example) == [expected]
    trunk = example.documents[0]
    assert trunk.trunk == [0, 1, 2, 9, 5, 6, 7, 0] and trunk.loss_on == range(1, 8)
    assert all(not len(d.loss_on) for d in example.documents[1:])


def test_a_group_predicts_its_next_text_and_encodes_only_the_preds_more():
    documents = [Document([0, n, n, 0], range(1, 4)) for n in (1, 2, 3)]
    views = [View([0, n, n], 1, document=n - 1) for n in (1, 2, 3)]
    texts = Texts(documents, [(views[0], views[1]), (views[1], views[2])], longest=8)
    example = Pair(Options(width=1, preds=(20,))).layout(texts)
    assert views_of(example) == [([0, 1, 1, 20], [0, 2, 2]), ([0, 2, 2, 20], [0, 3, 3])]
    assert sum(map(len, example.documents)) == 12 + 2


def test_steps_predict_the_next_and_ignore_last_token():
    options = Options(width=1, preds=(20,), last_token=-1)
    example = Step(options).layout(example_texts())
    assert views_of(example) == [([0, 1, 2, 9, 5, 20], [0, 6, 7])]
    few = Step(options).layout(example_texts(steps=lambda: []))
    assert few.pairs == [] and few.no_term == "fewer than two steps"


def test_a_view_that_is_cut_off_has_no_term():
    cut = example_texts(documents=[Document([0, 1], range(1, 2))])
    assert "cut off" in Pair(Options(width=1)).layout(cut).no_term
    assert "cut off" in Pair(Options(width=1)).layout(example_texts(longest=3)).no_term
    with pytest.raises(ValueError, match="training.last_token=-9: a view has 4 tokens"):
        Pair(Options(width=1, last_token=-9)).layout(example_texts())


@pytest.mark.parametrize(
    "text, steps",
    [
        ("one", None),
        ("one\n\n", None),
        ("\n\none", None),
        ("one\n\ntwo", ("one\n\n", "two")),
        ("one\r\n \t\r\n\n  two\n\nthree", ("one\r\n \t\r\n\n  ", "two\n\n")),
    ],
)
def test_a_blank_line_ends_a_step(text, steps):
    ends = find_steps(text)
    assert (ends and (text[: ends.first], text[ends.first : ends.second])) == steps


def test_layout_leaves_the_texts_as_they_are():
    """Arms share texts; a branch belongs to one example."""
    texts = example_texts()
    Pair(Options(width=1, preds=(20,))).layout(texts)
    assert texts.documents == example_texts().documents


# ---- distances


@pytest.mark.parametrize("kind", DISTANCES)
def test_distances_match_their_formulas(kind):
    u, v = torch.randn(7, 5), torch.randn(7, 5)
    cosines = F.cosine_similarity(u[:, None], v[None], dim=-1)
    formulas = {
        "cosine": 1 - cosines.diagonal(),
        "l2": (u - v).pow(2).sum(1).sqrt(),
        "mse": (u - v).pow(2).mean(1),
        "infonce": -(cosines / 0.07).log_softmax(1).diagonal(),
    }
    assert kind in formulas, "add the formula of the new distance here"
    per_pair = formulas[kind]
    torch.testing.assert_close(mean_distance(kind, u, v), per_pair.mean(), **TOLERANCE)
    weight = torch.tensor([0.5, 0, 1, 0.25, 0, 2, 1])
    if kind == "infonce":  # pairs of weight 0 are no negatives
        there = weight > 0
        own = -(cosines[there][:, there] / 0.07).log_softmax(1).diagonal()
        per_pair = torch.zeros(7).masked_scatter(there, own)
    weighted = distance(kind, Views(u, v), weight)
    torch.testing.assert_close(weighted, (per_pair * weight).sum(), **TOLERANCE)


def test_infonce_has_no_negatives_of_its_own_group():
    u, v, group = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 0, 1, 2, 2])
    expected = []
    for i in range(5):
        kept = [j for j in range(5) if j == i or group[j] != group[i]]
        scores = torch.stack([F.cosine_similarity(u[i], v[j], dim=0) / 0.07 for j in kept])
        expected.append(-scores.log_softmax(0)[kept.index(i)])
    found = mean_distance("infonce", u, v, group=group)
    torch.testing.assert_close(found, torch.stack(expected).mean(), **TOLERANCE)


def test_computed_in_float32_under_autocast():
    h = torch.randn(2, 12, 8, dtype=torch.bfloat16)
    places = [torch.tensor(x) for x in ([[3], [4]], [[5], [9]], [[0], [0]], [[11], [11]])]
    for kind in DISTANCES:
        with torch.autocast("cpu", torch.bfloat16):
            u, v, _, _ = span_views(h, places)
            d = mean_distance(kind, u, v)
        assert u.dtype == d.dtype == torch.float32
        u, v, _, _ = span_views(h.float(), places)
        assert d == mean_distance(kind, u, v)


@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_equal_states_give_no_gradient_and_no_nan(kind, noise):
    """A row of one repeated token: all states are equal but for rounding."""
    h = (torch.randn(1, 1, 8) + noise * torch.randn(2, 12, 8)).requires_grad_()
    places = [torch.tensor(x) for x in ([[2], [5]], [[4], [7]], [[0], [0]], [[11], [11]])]
    d = distance(kind, span_views(h, places), torch.full((2, 1), 0.5))
    d.backward()
    assert h.grad.isfinite().all()
    assert h.grad.abs().max() < 1  # a plain cosine similarity gives some 1e5 here
    if kind == "cosine":
        assert d.item() == 1 and not h.grad.any()


def test_a_short_vector_above_the_floor_keeps_its_gradient():
    h = torch.randn(1, 12, 8) + 0.1 * torch.randn(1, 12, 8)
    direction = F.normalize(torch.randn(8), dim=0)
    h[0, 4] = h[0, 1] + 0.005 * h[0, 0].norm() * direction  # 5 thousandths of a state
    h.requires_grad_()
    views = span_views(h, [torch.tensor([[n]]) for n in (2, 4, 0, 11)])
    d = distance("cosine", views, torch.ones(1, 1))
    plain = 1 - F.cosine_similarity(views.u, views.v, dim=-1).item()
    assert d.item() == pytest.approx(plain, abs=1e-4) and d.item() != 1
    d.backward()
    assert h.grad.norm() > 1


def test_the_noise_floor_follows_the_dtype():
    state = torch.tensor([[3.0, 4.0]])
    assert noise_floor(state, torch.float32).item() == pytest.approx(5e-3)
    assert noise_floor(state, torch.bfloat16).item() == pytest.approx(5 / 256)


# ---- norm, predictor, schedule


def test_normed_states_are_compared_if_asked_for():
    h, places = torch.randn(1, 6, 8), torch.tensor([1, 4])
    normed = F.rms_norm(h, (8,))[0, places]
    for objective, expected in (
        (Pair(Options(width=8)), normed),
        (Pair(Options(width=8, normed=False)), h[0, places]),
        (Span(Options(width=8)), h[0, places]),
        (Span(Options(width=8, normed=True)), normed),
    ):
        torch.testing.assert_close(objective.gather(h, places), expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["span", "pair", "step"])
def test_a_linear_predictor_begins_as_the_identity_and_maps_view_a(name):
    h, zeros = torch.randn(1, 12, 8), torch.zeros(1, 12, dtype=torch.int64)
    batch = Batch(
        zeros,
        zeros,
        document=zeros,
        pairs=torch.tensor([[2], [9]]),
        weight=torch.ones(1),
        group=torch.tensor([0]),
        items=torch.tensor([0]),
    )
    plain = OBJECTIVES[name](Options(width=8))
    drawn = plain.draw(batch, StepRandom(0, 0, batch.items, 1))
    plain = plain.views(None, batch, h, drawn)
    mapped = OBJECTIVES[name](Options(width=8, predictor="linear"))
    torch.testing.assert_close(mapped.predicted_views(None, batch, h, drawn).u, plain.u)
    with torch.no_grad():
        mapped.predictor.weight.mul_(2)
    views = mapped.predicted_views(None, batch, h, drawn)
    torch.testing.assert_close(views.u, 2 * plain.u)
    torch.testing.assert_close(views.v, plain.v)


@pytest.mark.parametrize("options", [{"distance": "l2"}, {"predictor": "linear"}])
@pytest.mark.parametrize("name", ["mtp", "masked_ce", "next", "mtp,next"])
def test_an_objective_refuses_what_it_would_not_use(name, options):
    with pytest.raises(ValueError, match=f"the objective {name} compares no vectors"):
        make_objective(name, Options(width=8, **options))
    make_objective(f"{name},span", Options(width=8, **options))


def test_the_weight_over_a_run():
    def weights(**k):
        return [jepa_weight(p, 0.2, **k) for p in (0.0, 0.3, 0.5, 0.7, 0.99)]

    assert weights() == [0.2] * 5
    assert weights(start_frac=0.3) == [None, 0.2, 0.2, 0.2, 0.2]
    assert weights(end_frac=0.5) == [0.2, 0.2, None, None, None]
    ramp = weights(start_frac=0.3, warmup_frac=0.4)
    assert ramp[0] is None and ramp[1:] == pytest.approx([0, 0.1, 0.2, 0.2])
    assert jepa_weight(0.5, 0.0) is None
    assert weights(warmdown_frac=0.5) == pytest.approx([0.2, 0.2, 0.2, 0.12, 0.004])
    fall = weights(end_frac=0.6, warmdown_frac=0.6)
    assert fall[:3] == pytest.approx([0.2, 0.1, 0.2 / 6]) and fall[3:] == [None, None]


@pytest.mark.parametrize(
    "text, message",
    [
        ("spam", "must be span, pair, .* or masked_ce, or several as masked,mtp:0.5"),
        ("span,", "must be span"),
        ("span,span:2", "names span twice"),
        ("span:x", "the factor of span is no number"),
        ("span:0", "the factor of span must be above 0"),
        ("span:nan", "the factor of span must be above 0"),
        ("span:inf", "the factor of span must be above 0"),
    ],
)
def test_a_sum_that_is_misspelt_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        make_objective(text, Options(width=8))


def test_random_dropout_of_the_term_is_a_function_of_seed_and_step():
    kept = [keeps_term(3, step, 0.3) for step in range(2000)]
    assert kept == [keeps_term(3, step, 0.3) for step in range(2000)]
    assert np.mean(kept) == pytest.approx(0.3, abs=0.05)  # five standard deviations
    assert all(keeps_term(3, step, 1.0) for step in range(50))
