"""Every JEPA objective: which tokens are encoded, which vectors of the hidden states are compared, and how far apart they are.

| to change                                   | edit                    | set by                                          |
|---|---|---|
| which spans are drawn                       | sample_spans, place_spans | JEPA_MAX_SPAN_FRAC, JEPA_SPANS, JEPA_DOC      |
| the two vectors of a span                   | span_views              | JEPA_LAYER (which states), JEPA_NORM            |
| the views of a pair or a group of texts     | lay_out                 | JEPA_PRED_TOKENS, JEPA_PRED_POSITION, JEPA_REVERSE, LOSS_ON |
| how they fill rows                          | pack, Document.write    | TRAIN_SEQ_LEN, GRAD_ACCUM_STEPS                 |
| the two vectors of a pair                   | pair_views              | JEPA_LAYER, JEPA_NORM                           |
| the distance between them                   | distance                | JEPA_DISTANCE                                   |
| which differences are rounding error        | noise_floor             |                                                 |
| the weight over the run                     | jepa_weight, keeps_term | JEPA_LAMBDA, JEPA_START_FRAC, JEPA_END_FRAC, JEPA_WARMUP_FRAC, JEPA_RATIO |
| how its gradient moves the weights          | training_step in train_gpt.py | JEPA_UPDATE, JEPA_ROWS_FRAC               |
| what is measured of it                      | state_statistics, diagnostic_warnings | DIAG_EVERY                        |

Nothing here knows a model, and nothing but *_views, noise_floor and distance runs inside the compiled graph.
Shapes: B rows, T tokens, D width, S spans a row, N pairs of a micro-batch.
"""
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

DISTANCES = ("cosine", "l2", "mse", "infonce")
INFONCE_TEMPERATURE = 0.07  # as LLM-JEPA, arXiv 2509.14252
MAX_PRED_TOKENS = 10  # as many as a pairs vocabulary has


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
    nor on accumulation. A fragment of L tokens is chosen with probability proportional to L among those with L >= 3.
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
    weight = (count > 0).expand(B, spans).float()
    a, b = place_spans(uniform[..., 1:], start, end, max_span_frac)
    a = torch.where(weight > 0, a, start).clamp(min=min(1, T - 1))
    return a, torch.where(weight > 0, b, a), start, end, weight


def place_spans(uniform, start, end, max_span_frac):
    """One span a..b (int64, any shape) in each fragment start..end of L >= 3 tokens, from two uniform numbers (..., 2).

    The length is uniform in 1..min(max(1, floor(max_span_frac * L)), L - 2), the place uniform given the length.
    """
    L = end - start + 1
    longest = torch.minimum((max_span_frac * L.double()).long().clamp(min=1), L - 2).clamp(min=1)
    length = 1 + (uniform[..., 0] * longest).long()
    a = start + 1 + (uniform[..., 1] * (L - length)).long()  # a may be start + 1 .. end - length + 1: L - length places
    return a, a + length - 1


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


@dataclass
class Document:
    """A piece of a row: a trunk, and a branch that continues trunk[:fork + 1] and that the trunk doesn't see.

    It is laid out depth first: trunk[:fork + 1], branch, the rest of the trunk. So a token sees an earlier one exactly
    where it lies in that one's subtree, which is an interval: `ends` holds, for every token, the index behind its last
    descendant. The trunk tokens loss_on, never the first, are targets of the token before them.
    """
    trunk: list
    loss_on: range = range(0)
    branch: list = field(default_factory=list)
    fork: int = 0

    def __len__(self):
        return len(self.trunk) + len(self.branch)

    def visible_pairs(self):
        """How many (query, key) pairs attention needs: what its FLOPs are proportional to."""
        n, k = len(self.trunk), len(self.branch)
        return n * (n + 1) // 2 + k * (self.fork + 1) + k * (k + 1) // 2

    def write(self, at, idx, targets, positions, ends):
        """Write this document into row arrays (T,) from column `at` on; targets must be -1 beforehand."""
        n, k, inner = len(self.trunk), len(self.branch), self.fork + 1
        stop, trunk = at + n + k, np.arange(n)
        columns = at + trunk + np.where(trunk < inner, 0, k)
        branch = slice(at + inner, at + inner + k)
        idx[columns], idx[branch] = self.trunk, self.branch
        positions[columns], positions[branch] = trunk, np.arange(inner, inner + k)
        ends[columns], ends[branch] = stop, at + inner + k
        trained = np.array(self.loss_on, dtype=int)
        targets[columns[trained - 1]] = np.array(self.trunk)[trained]


@dataclass
class Example:
    """The documents of one example, and its pairs of views ((document, index of a token in it), the same): A predicts B."""
    documents: list
    pairs: list = field(default_factory=list)

    def add_pair(self, a, b, branch=()):
        """Let view a predict view b. A view is (document, index of its last token), or tokens that are encoded for the term
        alone, in a document of their own; a's own state is the last of `branch`, the tokens that continue it."""
        def place(view):
            if isinstance(view, tuple):
                return view
            self.documents.append(Document(view))
            return len(self.documents) - 1, len(view) - 1
        number, last = place(a)
        if len(branch):
            self.documents[number].branch, self.documents[number].fork = list(branch), last
        self.pairs.append(((number, last + len(branch)), place(b)))

    def without_term(self):
        """The documents that the cross entropy is about, without branches: what a step costs that drops the term."""
        return Example([Document(d.trunk, d.loss_on) for d in self.documents if len(d.loss_on)])


def lay_out(views, *, paired, marker, separator=None, preds=(), front=False, reverse=False, target_only=False, term=True):
    """What is encoded of one example, each token once where its context allows: an Example.

    views: lists of tokens. paired: they are (Text, Code), and the trunk is marker, Text, separator, Code, marker (the end
    token); with the term, Code stands once more by itself, after a marker. Otherwise they are a group, every view is a
    document marker, view, marker, and view i predicts view i + 1. View A ends in `preds`, the [PRED] tokens, a branch
    behind its last token (none: it ends there itself); front: they stand before it, in a document of its own, since
    that changes all its states. reverse: B and A change places. target_only: no loss on Text and separator.
    term=False: the trunks alone, as without JEPA. Source: LLM-JEPA, arXiv 2509.14252.
    """
    if paired:
        text, code = views
        trunk = [marker, *text, separator, *code, marker]
        documents = [Document(trunk, range(len(text) + 2 if target_only else 1, len(trunk)))]
        ways, places = [(0, 1)], {0: (0, len(text))}  # the last token of a view, where it is encoded anyway
    else:
        documents = [Document([marker, *view, marker], range(1, len(view) + 2)) for view in views]
        ways = [(i, i + 1) for i in range(len(views) - 1)]
        places = {i: (i, len(view)) for i, view in enumerate(views)}
    example = Example(documents)
    for a, b in ways if term else ():
        a, b = (b, a) if reverse else (a, b)
        view_b = places.get(b, [marker, *views[b]])
        if front and len(preds):
            example.add_pair([marker, *preds, *views[a]], view_b)
        else:
            example.add_pair(places.get(a, [marker, *views[a]]), view_b, preds)
    return example


def first_fit(lengths, left, T):
    """[(row, column)] for documents of these lengths, each in the first row with room, the longest first; None where one has
    none. left: free tokens of each row of T, which is updated."""
    places = [None] * len(lengths)
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        row = int((left >= lengths[n]).argmax())  # the first that has room; 0 where none has
        if left[row] < lengths[n]:
            return None
        places[n] = row, T - int(left[row])
        left[row] -= lengths[n]
    return places


def pack(examples, rows, T):
    """Place the documents of every example inside one micro-batch of `rows` rows of T tokens, the longest example first.

    Returns, per example, (micro-batch, [(row, column) per document]). ValueError where one fits no empty micro-batch.
    """
    placed, free = [None] * len(examples), []  # free: per micro-batch, (tokens left in each row, their sum, their maximum)
    lengths = [[len(d) for d in e.documents] for e in examples]
    for i in sorted(range(len(examples)), key=lambda i: -sum(lengths[i])):
        total, longest = sum(lengths[i]), max(lengths[i])
        for m in [m for m, (_, everything, most) in enumerate(free) if everything >= total and most >= longest] + [len(free)]:
            left = free[m][0].copy() if m < len(free) else np.full(rows, T)
            if places := first_fit(lengths[i], left, T):
                break
        else:
            raise ValueError(f"an example of {len(lengths[i])} documents does not fit a micro-batch of {rows} rows of {T} tokens")
        free[m:m + 1] = [(left, int(left.sum()), int(left.max()))]
        placed[i] = m, places
    return placed


def write_rows(documents, places, rows, T, filler):
    """Documents at their places [(row, column)] as the arrays idx, targets (-1: none), positions and ends, (rows, T), int64.

    What is left of a row is a document of its own, of `filler` tokens without targets.
    """
    idx, targets = np.full((rows, T), filler), np.full((rows, T), -1)
    positions, ends = np.tile(np.arange(T), (rows, 1)), np.full((rows, T), T)
    filled = np.zeros(rows, dtype=np.int64)
    for document, (row, column) in zip(documents, places):
        document.write(column, idx[row], targets[row], positions[row], ends[row])
        filled[row] = max(filled[row], column + len(document))
    for row, column in enumerate(filled):
        positions[row, column:] = np.arange(T - column)
    return [x.astype(np.int64) for x in (idx, targets, positions, ends)]


def pair_views(h, a, b):
    """The states (N, D), float32, at the places a and b (N,) of h (B, T, D), counted through all rows: two views of each pair."""
    at_a, at_b = h.flatten(0, 1)[torch.stack((a, b))].float()
    return at_a, at_b


def noise_floor(h, at):
    """The length (B, S) under which a difference of states is rounding error: of that of h (B, T, D) at `at` (B, S), a
    thousandth, in bfloat16 (which rounds each number by up to 1/256) a 256th."""
    share = max(1e-3, torch.finfo(h.dtype).eps / 2)
    return share * h.detach().gather(1, at[..., None].expand(-1, -1, h.size(2))).float().norm(dim=-1)


def unit(u, floor):
    """u (N, D) divided by its length, or zero, without a gradient, where that is not above floor (N, 1)."""
    squares = u.square().sum(-1, keepdim=True)
    return u * torch.rsqrt(torch.where(squares > floor**2, squares, torch.inf))


def distance(u, v, kind, weight=None, floor=None, group=None):
    """How far views u are from v, both (..., D), in float32 whatever the autocast; a scalar.

    kind: cosine 1 - cos; l2 the norm of the difference; mse its mean square; infonce the cross entropy of finding v_i
    among all v given u_i (cosines / 0.07): the other v of this call are its negatives, but for those of i's own group
    (...), int64. Unlike the other kinds it is no sum over parts of a batch, so a training step gives it all pairs at once.
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
            absent = torch.zeros_like(cosines, dtype=torch.bool) if weight is None else (weight.flatten() == 0).expand(len(u), -1)
            if group is not None:
                absent = absent | (group.flatten() == group.flatten()[:, None])
            itself = torch.eye(len(u), dtype=torch.bool, device=u.device)
            d = F.cross_entropy(cosines.masked_fill(absent & ~itself, -torch.inf) / INFONCE_TEMPERATURE,
                                torch.arange(len(u), device=u.device), reduction="none")
        else:
            raise ValueError(f"JEPA_DISTANCE={kind!r} is none of {', '.join(DISTANCES)}")
        return d.mean() if weight is None else (d * weight.flatten()).sum()


def state_statistics(h, counted, positions=None):
    """Geometry of states h (B, T, D) where counted (B, T) says so, a dict of floats. positions (B, T), default 0..T-1.

    effective_rank: exp of the entropy of the singular values' shares, 1 to D (Roy & Vetterli 2007; RankMe, arXiv 2210.02885);
    state_cosine: mean cosine of two different states; curvature: mean of 1 - cos of one step of the trajectory and the next,
    0 on a straight line, 1.5 for independent states; over tokens that follow one another.
    """
    x = h[counted][:4096].double()
    singular = torch.linalg.eigvalsh(x.mT @ x).clamp(min=0).sqrt()
    share = singular / singular.sum().clamp(min=torch.finfo(singular.dtype).tiny)
    total, n = F.normalize(x, dim=-1).sum(0), len(x)
    step = h.double().diff(dim=1)
    joined = counted[:, 1:] & counted[:, :-1]
    if positions is not None:
        joined = joined & (positions.diff(dim=1) == 1)
    straight = F.cosine_similarity(step[:, 1:], step[:, :-1], dim=-1)[joined[:, 1:] & joined[:, :-1]]
    return {"effective_rank": torch.special.entr(share).sum().exp().item(), "state_cosine": ((total @ total - n) / max(1, n * (n - 1))).item(),
            "curvature": (1 - straight.mean()).item()}


def diagnostic_warnings(found, width, term=True):
    """Plain words for diagnostics that look like a collapse; term: whether there is one in the loss."""
    if found["effective_rank"] < 0.1 * width:
        yield f"the compared states have effective rank {found['effective_rank']:.1f}, under 10% of the width {width}: they collapse"
    if term and abs(found["jepa_matched"] - found["jepa_shuffled"]) <= 0.01 * abs(found["jepa_shuffled"]):
        yield f"the term is {found['jepa_matched']:.4f} for matched views and {found['jepa_shuffled']:.4f} for shuffled ones: it doesn't tell them apart"


def jepa_weight(progress, jepa_lambda, start_frac=0.0, end_frac=1.0, warmup_frac=0.0):
    """Lambda at this fraction of the run, None where the term is off: before start_frac and from end_frac on.

    After the start it ramps up linearly over warmup_frac of the run.
    """
    if jepa_lambda == 0 or not start_frac <= progress < end_frac:
        return None
    return jepa_lambda * (min(1.0, (progress - start_frac) / warmup_frac) if warmup_frac > 0 else 1.0)


def keeps_term(seed, step, ratio):
    """Whether this step computes the JEPA term at all, with probability ratio (random JEPA dropout, arXiv 2509.14252): the
    same on every rank, and a function of seed and step alone."""
    return ratio >= 1 or np.random.default_rng([seed, step, 2]).random() < ratio  # 2: not the stream of the data order
