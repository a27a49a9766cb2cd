"""The span objective: a random span of text against what surrounds it.

Of a span a..b in a fragment start..end of a document,

    patch   = h[b] - h[a-1]
    context = (h[a-1] - h[start]) + (h[end] - h[b])

and the term is 1 - cos(context, patch), or another distance. The two add up to h[end] - h[start].
Gradients flow through both. Differences that are rounding noise don't count (noise_floor).
Source: parameter-golf issue 1772, which has start 0 and end T-1. LLM-JEPA's code has it as STP.

Shapes: B rows, T tokens, S spans a row or region, N regions.
"""

import torch

from nanojepa.objectives.distance import Views, noise_floor
from nanojepa.objectives.objective import Objective
from nanojepa.packing import Example, document_fragments


class Span(Objective):
    def layout(self, texts):
        return text_regions(texts, 3)

    def draw(self, batch, rng):
        """places (4, ..., S): a-1, b, start and end of each span, counted through all rows."""
        options = self.options
        if batch.pairs is None:
            uniform = rng.uniform(options.spans, 3)
            document = batch.document if options.in_documents else torch.zeros_like(batch.idx)
            start, end, weight = choose_fragments(uniform[..., 0], document)
            uniform = uniform[..., 1:]
        else:
            uniform = rng.uniform(options.spans, 2)
            # What layout() has paired: the first and the last token of each region (N, S).
            start, end, weight = (
                x[:, None].expand(-1, options.spans) for x in (*batch.pairs, batch.weight)
            )
        a, b = place_spans(uniform, start, end, options.max_span_frac)
        places = torch.stack((a - 1, b, start, end))
        places = torch.where(weight > 0, places, start)  # padding has no place; any index will do
        return {"places": places, "weight": weight}

    def views(self, lm, batch, states, drawn):
        # One gather, so that the backward pass allocates one gradient of the states, not four.
        h_before, h_b, h_start, h_end = self.gather(states, drawn["places"])
        context = (h_before - h_start) + (h_end - h_b)
        patch = h_b - h_before
        return Views(context, patch, noise_floor(h_b, states.dtype))


def text_regions(texts, least):
    """The documents, and for every region a pair of places: its first and its last token.

    least: tokens of a region. Shorter ones are left out.
    """
    regions = [(a, b) for a, b in texts.regions if b[1] - a[1] + 1 >= least]
    too_short = "" if regions else f"fewer than {least} tokens in a row to draw from"
    return Example(texts.documents, regions, too_short)


def choose_fragments(uniform, document):
    """A document fragment for each span, from a uniform number (B, S) for each.

    document (B, T): the number of the fragment that each token of a row of text lies in. A fragment
    of L tokens is chosen with probability proportional to L among those with at least three.
    Returns start, end (int64) and weight (float32), all (B, S); start and end count through all
    rows. Weight 0 marks a row without such a fragment.
    """
    B, T = document.shape
    first, last = document_fragments(document)
    ordinal = (last - first >= 2).cumsum(1)  # tokens of long enough fragments so far
    count = ordinal[:, -1:]
    pick = torch.searchsorted(ordinal, (uniform * count).long() + 1)
    pick = pick.clamp(max=T - 1)  # of a row of weight 0
    row = torch.arange(B)[:, None] * T
    weight = (count > 0).expand(uniform.shape).float()
    return row + first.gather(1, pick), row + last.gather(1, pick), weight


def place_spans(uniform, start, end, max_span_frac):
    """One span a..b (int64, any shape) in each start..end, from two uniform numbers (..., 2).

    With L tokens from start to end, the length is uniform in 1..min(max(1, max_span_frac * L),
    L - 2), so that the context is never empty, and the place is uniform given the length. So
    start < a <= b <= end.
    """
    L = end - start + 1
    longest = (max_span_frac * L.double()).long().clamp(min=1)
    longest = torch.minimum(longest, L - 2).clamp(min=1)
    length = 1 + (uniform[..., 0] * longest).long()
    # a may be start + 1 .. end - length + 1, which are L - length places.
    a = start + 1 + (uniform[..., 1] * (L - length)).long()
    return a, a + length - 1
