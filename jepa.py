"""Every JEPA objective: which vectors of the hidden states are compared, and how far apart they are.

| to change                                   | edit          | set by                                          |
|---|---|---|
| which spans are drawn                       | sample_spans  | JEPA_MAX_SPAN_FRAC, JEPA_SPANS, JEPA_DOC        |
| the two vectors of a span                   | span_views    | JEPA_LAYER (which states)                       |
| the distance between them                   | distance      | JEPA_DISTANCE                                   |
| which differences are rounding error        | noise_floor   |                                                 |
| the weight over the run                     | jepa_weight   | JEPA_LAMBDA, JEPA_START_FRAC, JEPA_END_FRAC, JEPA_WARMUP_FRAC |

Nothing here knows a model, and nothing but span_views and distance runs inside the compiled graph.
Shapes: B rows, T tokens, D width, S spans a row.
"""
import torch
import torch.nn.functional as F

DISTANCES = ("cosine", "l2", "mse", "infonce")
INFONCE_TEMPERATURE = 0.07  # as LLM-JEPA, arXiv 2509.14252


def document_fragments(idx, doc_token):
    """First and last position (B, T) of the document fragment in which each token of idx (B, T) lies.

    A fragment begins at the row's first token and at every document marker. doc_token None: the whole row.
    """
    B, T = idx.shape
    position = torch.arange(T).expand(B, T)
    if doc_token is None:
        return torch.zeros_like(position), torch.full_like(position, T - 1)
    is_first = (idx == doc_token) | (position == 0)
    first = torch.where(is_first, position, 0).cummax(1).values
    # the last token of a fragment stands before the next first token, or at the end of the row
    is_last = torch.cat((is_first[:, 1:], torch.ones(B, 1, dtype=torch.bool)), 1)
    last = torch.where(is_last, position, T).flip(1).cummin(1).values.flip(1)
    return first, last


def sample_spans(idx, generator, *, spans, max_span_frac, doc_token=None, total_rows=None, first_row=0):
    """Draw random spans a..b, outside the compiled graph, each inside one fragment start..end.

    idx: int64 CPU tensor (B, T), rows first_row.. of a global batch of total_rows (default: idx is all of it). The
    generator is drawn for the whole global batch, so the spans of a sequence depend neither on the rank that holds it
    nor on accumulation. A fragment of L tokens is chosen with probability proportional to L among those with L >= 3;
    the length is uniform in 1..min(max(1, floor(max_span_frac * L)), L - 2), the place uniform given the length.
    Returns a, b, start, end, int64, and weight, float32, all (B, S). Weight 0 marks a row without a fragment of three
    tokens; its positions are valid indices and mean nothing.
    """
    B, T = idx.shape
    uniform = torch.rand(total_rows or B, spans, 3, generator=generator, dtype=torch.float64)[first_row:first_row + B]
    first, last = document_fragments(idx, doc_token)
    eligible = last - first >= 2
    ordinal = eligible.cumsum(1)  # the n-th eligible token of a row carries the number n
    count = ordinal[:, -1:]
    pick = torch.searchsorted(ordinal, (uniform[..., 0] * count).long() + 1).clamp(max=T - 1)
    start, end = first.gather(1, pick), last.gather(1, pick)
    L = end - start + 1
    longest = torch.minimum((max_span_frac * L.double()).long().clamp(min=1), L - 2).clamp(min=1)
    length = 1 + (uniform[..., 1] * longest).long()
    a = start + 1 + (uniform[..., 2] * (L - length)).long()  # a may be start + 1 .. end - length + 1: L - length places
    weight = (count > 0).expand(B, spans).float()
    a = torch.where(weight > 0, a, start).clamp(min=min(1, T - 1))
    b = torch.where(weight > 0, a + length - 1, a)
    return a, b, start, end, weight


def span_views(h, a, b, start=None, end=None):
    """The two vectors of a span: patch = h[b] - h[a-1], context = (h[a-1] - h[start]) + (h[end] - h[b]).

    h (B, T, D); a, b, start, end int64 (B,) or (B, S) with start < a <= b <= end; start and end default to 0 and T-1.
    Returns (context, patch), float32, (B, D) or (B, S, D); their sum is h[end] - h[start]. Gradients flow through both.
    Source: parameter-golf issue 1772, there with start 0 and end T-1.
    """
    start = torch.zeros_like(a) if start is None else start
    end = torch.full_like(a, h.size(1) - 1) if end is None else end
    positions = torch.stack((a - 1, b, start, end))  # one gather, so that backward fills one tensor of h's size, not four
    rows = torch.arange(h.size(0), device=h.device).view(-1, *[1] * (a.dim() - 1))
    before, last, first, final = h[rows, positions].float()
    return (before - first) + (final - last), last - before


def noise_floor(h, at):
    """The length (B, S) under which a difference of states is rounding error: of that of h (B, T, D) at `at` (B, S), a
    thousandth, in bfloat16 (which rounds each number by up to 1/256) a 256th."""
    share = max(1e-3, torch.finfo(h.dtype).eps / 2)
    return share * h.detach().gather(1, at[..., None].expand(-1, -1, h.size(2))).float().norm(dim=-1)


def unit(u, floor):
    """u (N, D) divided by its length, or zero, without a gradient, where that is not above floor (N, 1)."""
    squares = u.square().sum(-1, keepdim=True)
    return u * torch.rsqrt(torch.where(squares > floor**2, squares, torch.inf))


def distance(u, v, kind, weight=None, floor=None):
    """How far views u are from v, both (..., D), in float32 whatever the autocast; a scalar.

    kind: cosine 1 - cos; l2 the norm of the difference; mse its mean square; infonce the cross entropy of finding v_i
    among all v given u_i (cosines / 0.07; its negatives are the pairs of this call, that is of one micro-batch on one
    rank, so unlike the others it depends on GRAD_ACCUM_STEPS and the number of ranks).
    weight (...): the sum over pairs of weight * distance, pairs of weight 0 being no negatives either; default: the mean.
    floor (...), default 0: a vector no longer than this has no direction, its cosines count as 0 and get no gradient.
    Differences of equal states need that (before the first step a state is its token's embedding; later, repeated
    tokens): their direction is rounding noise, and the gradient of a cosine, 1 / length, would drown every other one.
    """
    with torch.autocast(u.device.type, enabled=False):
        u, v = u.float().flatten(0, -2), v.float().flatten(0, -2)
        floor = u.new_zeros(len(u), 1) if floor is None else floor.flatten()[:, None]
        if kind == "cosine":
            d = 1 - (unit(u, floor) * unit(v, floor)).sum(-1)
        elif kind == "l2":
            d = torch.linalg.vector_norm(u - v, dim=-1)
        elif kind == "mse":
            d = (u - v).square().mean(-1)
        elif kind == "infonce":
            cosines = unit(u, floor) @ unit(v, floor).T
            if weight is not None:
                absent = (weight.flatten() == 0) & ~torch.eye(len(u), dtype=torch.bool, device=u.device)
                cosines = cosines.masked_fill(absent, -torch.inf)
            d = F.cross_entropy(cosines / INFONCE_TEMPERATURE, torch.arange(len(u), device=u.device), reduction="none")
        else:
            raise ValueError(f"JEPA_DISTANCE={kind!r} is none of {', '.join(DISTANCES)}")
        return d.mean() if weight is None else (d * weight.flatten()).sum()


def jepa_weight(progress, jepa_lambda, start_frac=0.0, end_frac=1.0, warmup_frac=0.0):
    """Lambda at this fraction of the run, None where the term is off: before start_frac and from end_frac on.

    After the start it ramps up linearly over warmup_frac of the run.
    """
    if jepa_lambda == 0 or not start_frac <= progress < end_frac:
        return None
    return jepa_lambda * (min(1.0, (progress - start_frac) / warmup_frac) if warmup_frac > 0 else 1.0)
