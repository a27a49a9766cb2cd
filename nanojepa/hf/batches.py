"""A fine-tuning step's examples, packed into few passes of few shapes.

Shapes: R rows of T tokens, N pairs of places.
"""

import itertools
import math

from nanojepa.objectives import StepRandom
from nanojepa.objectives.distance import ACROSS_PAIRS
from nanojepa.packing import Item, fill_rows, pack_rows, place_step


def count_pairs(examples):
    return sum(len(example.pairs) for example in examples)


def choose_row_length(examples, step_examples, multiple):
    """T, the tokens of a row: a multiple of `multiple`.

    A row holds the longest document. Longer rows leave less space empty, so T grows to a quarter of
    an average step. It grows to 512 at most, since attention costs its square. step_examples:
    examples of a step and process.
    """
    lengths = [len(d) for example in examples for d in example.documents]
    quarter = sum(lengths) / len(examples) * step_examples / 4
    return multiple * math.ceil(max(max(lengths), min(512, quarter)) / multiple)


class Packer:
    """Makes Batches of Examples, in few shapes.

    All rows of a run have one length. All Batches of a step have one number of rows, unless the
    distance needs batch_size examples in each.
    """

    def __init__(self, cfg, objective, filler, examples, multiple):
        """examples: all that will be packed. T is a multiple of `multiple`."""
        t = cfg.training
        self.seed, self.objective, self.filler = cfg.general.finetune_seed, objective, filler
        step_examples = 1 if t.memory_efficient else t.batch_size * t.grad_accum
        self.row_length = choose_row_length(examples, step_examples, multiple)
        tokens = 0 if t.memory_efficient else t.micro_batch_tokens
        self.max_rows = max(1, tokens // self.row_length)
        # Some distances need all views of batch_size examples at once.
        self.keeps_chunks = objective is not None and cfg.distance in ACROSS_PAIRS

    def split(self, chunks, numbers, term, step, total_items, agree=int):
        """The Batches of a step, of its examples on one process.

        chunks: lists of Examples. numbers: of each chunk's first pair, its number in the step.
        term: whether the step has the term, if there is one. If not, the term's views are not
        encoded either. total_items: pairs of the step. agree(count): how many Batches every process
        makes, if this one needs `count`. Sharded weights need as many passes everywhere, so some
        may be empty.
        """
        chunks = [self.encoded(chunk, term) for chunk in chunks]
        if self.keeps_chunks:
            packed = [
                pack_rows(chunk, self.filler, self.row_length, number)
                for chunk, number in zip(chunks, numbers, strict=True)
            ]
        else:
            packed = self.pack_few(chunks, numbers, agree)
        return [self.finish(batch, term, step, total_items) for batch in packed]

    def pack_few(self, chunks, numbers, agree):
        """Batches that may hold examples of any chunk, as few as max_rows allows."""
        examples, T = list(itertools.chain(*chunks)), self.row_length
        rows, placed = place_step(examples, T, self.max_rows)
        needed = 1 + max(place.micro_batch for place in placed)
        count = agree(needed)
        if count > needed:
            rows, placed = place_step(examples, T, self.max_rows, count)
        items = [[] for _ in range(count)]
        first_items = [
            number + count_pairs(chunk[:n])
            for chunk, number in zip(chunks, numbers, strict=True)
            for n in range(len(chunk))
        ]
        for n, (example, place) in enumerate(zip(examples, placed, strict=True)):
            items[place.micro_batch].append(Item(example, place.places, n, first_items[n]))
        return [fill_rows(own, rows, T, self.filler, room=1) for own in items]

    def encoded(self, examples, term):
        """The Examples as a step encodes them."""
        if term and self.objective is not None:
            return examples
        return [example.without_term() for example in examples]

    def finish(self, batch, term, step, total_items):
        """The Batch with its labels and what is drawn."""
        # The labels are found here, since finding them on a GPU would wait for it.
        batch.labels = (batch.targets.flatten() >= 0).nonzero()[:, 0]
        if term and self.objective is not None:
            rng = StepRandom(self.seed, step, batch.items, total_items)
            batch.drawn = self.objective.draw(batch, rng)
        return batch
