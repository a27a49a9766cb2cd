"""What every objective is: something laid out or drawn before the compiled graph, and something
compared inside it.

A new objective is one file beside this one, with a subclass that overrides one to three of the
four methods, and a line in the table of __init__.py.

Shapes: R rows of T tokens, N pairs of views, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanojepa.objectives import predictors
from nanojepa.objectives.distance import distance
from nanojepa.packing import Example


@dataclass(frozen=True)
class Options:
    """What the settings of either trainer tell an objective."""

    width: int  # D, of the states
    distance: str = "cosine"  # a key of DISTANCES
    # Whether states are compared after the final norm; None: as the objective prefers.
    normed: bool | None = None
    predictor: str = "identity"  # or linear: a trained D x D matrix on view A
    preds: tuple = ()  # ids of the [PRED] tokens
    front: bool = False  # [PRED]s before view A instead of after it
    reverse: bool = False  # view B predicts view A
    last_token: int = 0  # whose state is a view's; 0: its text's last, -1: its turn's last
    spans: int = 1  # spans a row, or a region
    max_span_frac: float = 0.5  # longest span over the length of what it is drawn in
    in_documents: bool = True  # in rows of text, a span lies inside one fragment of a document


class StepRandom:
    """The random numbers of one step: a function of seed, step and item alone.

    An item is a row of text, or a pair of places of a packed batch. All total_items of the step
    are drawn and those of this micro-batch are taken. So the numbers of an item depend neither on
    the ranks nor on gradient accumulation.
    """

    def __init__(self, seed, step, items, total_items):
        self.generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        self.items, self.total_items = items, total_items

    def uniform(self, *shape):
        """Numbers in [0, 1), float64, (items, *shape); every call gives new ones."""
        size = (self.total_items, *shape)
        return torch.rand(size, generator=self.generator, dtype=torch.float64)[self.items]


class Objective(nn.Module):
    """A term of the loss; it owns its predictor, if it has one."""

    default_normed = False  # whether it compares states after the final norm
    # Whether it compares two texts or steps. Rows of plain text give it nothing to compare, and
    # the settings of [PRED] tokens are for it alone.
    needs_pairs = False
    least_tokens = 3  # of a row, so that something is compared
    # Whether the states go through the head, and no other layer or norm makes sense.
    needs_last_layer = False
    compares_vectors = True  # whether it uses the options distance and predictor
    # How often it encodes the batch again, and how often it applies the head. FLOPs count that.
    more_passes = more_heads = 0

    def __init__(self, options):
        super().__init__()
        self.options = options
        self.normed = self.default_normed if options.normed is None else options.normed
        linear = self.compares_vectors and options.predictor == "linear"
        self.predictor = predictors.Linear(options.width) if linear else None

    @property
    def lays_out(self):
        """Whether it has a layout() of its own."""
        return type(self).layout is not Objective.layout

    def paired(self):
        """The objective that compares two texts: itself, or None."""
        return self if self.needs_pairs else None

    def layout(self, texts):
        """The Example of these Texts: which documents are encoded, which places are compared.

        By default the trunks are encoded, as without a term, and nothing is compared.
        """
        return Example(texts.documents)

    def draw(self, batch, rng):
        """What is drawn for a Batch outside the compiled graph, as a dict of CPU tensors.

        "weight" says what counts: 1 for a comparison, 0 for padding. The trainer divides it by its
        sum over the step (divide_weights), so that the term is a mean over all micro-batches and
        ranks. rng: the batch's StepRandom. By default the batch's pairs are compared.
        """
        if batch.pairs is None:
            raise ValueError(
                f"{type(self).__name__}: rows of text have no pairs laid out; override draw(), or "
                "set needs_pairs"
            )
        a, b = batch.pairs
        return {"a": a, "b": b, "weight": batch.weight, "group": batch.group}

    def views(self, lm, batch, states, drawn):
        """The Views that are compared, inside the compiled graph.

        states (R, T, D): the tapped layer. drawn: what draw() returned. lm: the language model,
        with lm.states(idx, positions, ends), lm.embed(idx) and lm.logits(states). None, the
        default: the objective doesn't compare two vectors, and overrides loss().
        """
        return None

    def loss(self, lm, batch, states, drawn):
        """The sum of weight * distance, a 0-dim tensor; by default, of the views."""
        views = self.predicted_views(lm, batch, states, drawn)
        return distance(self.options.distance, views, drawn["weight"])

    def more_targets(self, batch, drawn):
        """Targets (K, R, T), -1 for none, and factors (K,): what else the logits are scored on.

        The sum of factor * cross entropy is a part of the term. In pretraining the pass of the head
        that scores the next token computes it. By default there are no such targets.
        """
        return batch.targets[None][:0], batch.targets.new_empty(0, dtype=torch.float32)

    def whole_loss(self, lm, batch, states, drawn):
        """loss(), and the cross entropies of more_targets() by a pass of the head of its own."""
        targets, factors = self.more_targets(batch, drawn)
        loss = self.loss(lm, batch, states, drawn)
        return loss + lm.cross_entropies(states, targets, factors)[0] if len(targets) else loss

    def predicted_views(self, lm, batch, states, drawn):
        """The views, view A after the predictor."""
        views = self.views(lm, batch, states, drawn)
        if views is None or self.predictor is None:
            return views
        return views._replace(u=self.predictor(views.u))

    def gather(self, states, places):
        """The states (..., D), float32, at places (...), which count through all rows."""
        return self.compared(states.flatten(0, 1)[places])

    def compared(self, states):
        """States (..., D) as they are compared: float32, after the final norm if that is wanted."""
        states = states.float()
        return F.rms_norm(states, states.shape[-1:], eps=1e-6) if self.normed else states


def sum_weights(drawn):
    """The sums of the weights of what was drawn, one for each term: a tensor."""
    return torch.stack([x.sum() for name, x in drawn.items() if is_weight(name)])


def divide_weights(drawn, sums):
    """What was drawn, each weight divided by its sum over the step; a sum of 0 counts as 1."""
    sums = iter(sums.clamp(min=1))
    return {name: x / next(sums) if is_weight(name) else x for name, x in drawn.items()}


def is_weight(name):
    return name.rpartition(".")[2] == "weight"  # of one of several terms, it is NAME.weight
