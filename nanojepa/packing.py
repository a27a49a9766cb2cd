"""Documents as trees in rows: what is encoded of an example, where it lies, and who sees whom.

A document is a trunk with at most one branch. Packed rows hold many documents. A token sees its
own document's ancestors and nothing else, so every view has exactly the states it would have
alone. Positions restart with each document and go on from the fork in a branch.

Shapes: R rows of T tokens, N pairs of places.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention.flex_attention import create_block_mask


@dataclass
class Document:
    """A trunk, and a branch that continues trunk[: fork + 1] and that the trunk doesn't see.

    The trunk's tokens at loss_on, never the first, are targets of the token before them. In a row
    the document lies depth first: trunk[: fork + 1], the branch, the rest of the trunk.
    """

    trunk: list
    loss_on: range = range(0)
    branch: list = field(default_factory=list)
    fork: int = 0

    def __len__(self):
        return len(self.trunk) + len(self.branch)

    def positions(self):
        """How many it takes: those of the trunk, or of the branch and what it continues."""
        return max(len(self.trunk), self.fork + 1 + len(self.branch))

    def visible_pairs(self):
        """How many (query, key) pairs attention needs; its FLOPs are proportional to that."""
        n, k = len(self.trunk), len(self.branch)
        return n * (n + 1) // 2 + k * (self.fork + 1) + k * (k + 1) // 2

    def write(self, column, idx, targets, positions, ends):
        """Write this document into a row's arrays (T,) from `column` on; targets must be -1 there.

        ends: the index after each token's last descendant. Depth first, a subtree is an interval,
        so a token sees an earlier one exactly if it lies before that one's end.
        """
        n, k, inner = len(self.trunk), len(self.branch), self.fork + 1
        stop, trunk = column + n + k, np.arange(n)
        columns = column + trunk + np.where(trunk < inner, 0, k)
        branch = slice(column + inner, column + inner + k)
        idx[columns], idx[branch] = self.trunk, self.branch
        positions[columns], positions[branch] = trunk, np.arange(inner, inner + k)
        ends[columns], ends[branch] = stop, column + inner + k
        trained = np.array(self.loss_on, dtype=int)
        targets[columns[trained - 1]] = np.array(self.trunk)[trained]


@dataclass
class View:
    """A text to take a state of.

    tokens: up to the text's end. first: where the text begins in them. tail: what closes its turn.
    document: the number of the example's document that begins with these tokens, or None.
    """

    tokens: list
    first: int
    tail: list = field(default_factory=list)
    document: int | None = None


@dataclass
class Texts:
    """One example before an objective looks at it. A place is (document, index of a token in it).

    documents: the trunks, which the cross entropy is about. meaning: pairs of Views that mean the
    same. regions: pairs of places between which spans may be drawn. longest: tokens that a view
    may have. steps: returns the Views of the answer's first two steps, [] if it has fewer. cut:
    whether the end of a trunk was left out for its length.
    """

    documents: list
    meaning: list = field(default_factory=list)
    regions: list = field(default_factory=list)
    longest: int | None = None
    steps: Callable[[], list] = list
    cut: bool = False

    def is_cut(self, place):
        """Whether a state can't be taken: its document, or what it needs, is too long."""
        if isinstance(place, tuple):
            document, token = place
            return token >= len(self.documents[document].trunk)
        return self.longest is not None and len(place) > self.longest


@dataclass
class Example:
    """The documents to encode of one example, and the pairs of places that are compared.

    no_term: why nothing is compared, "" if something is or nobody asked for it. cut: as in Texts.
    """

    documents: list
    pairs: list = field(default_factory=list)
    no_term: str = ""
    cut: bool = False

    def add_pair(self, a, b, branch=()):
        """Compare the states at a and b.

        Each is a place, or tokens that are encoded for the term alone in a document of their own.
        With a branch, a's state is the branch's last one; it continues the document after a.
        """
        number, last = self.find_place(a)
        if len(branch):
            self.documents[number] = replace(self.documents[number], branch=list(branch), fork=last)
        self.pairs.append(((number, last + len(branch)), self.find_place(b)))

    def find_place(self, view):
        if isinstance(view, tuple):
            return view
        self.documents.append(Document(view))
        return len(self.documents) - 1, len(view) - 1

    def without_term(self):
        """The example as a step encodes it that drops the term: its trunks alone."""
        return Example([Document(d.trunk, d.loss_on) for d in self.documents if len(d.loss_on)])


@dataclass
class Batch:
    """One micro-batch.

    idx, targets (R, T): int64, targets of -1 are ignored. num_targets: of the whole step, an
    int or a 0-dim float tensor. positions, ends (R, T): of packed rows (Document.write); rows of
    text have no positions, and ends only if their documents don't see each other. document (R, T):
    a number for each document or fragment of one, another for its branch, and -1 for filler. pairs
    (2, N): the places that the objective laid out, counted through all rows; weight (N,): 1, or 0
    for padding; group (N,): the number of the example. items, total_items: see StepRandom. labels:
    places of the targets, counted through all rows, where they are wanted. drawn: what the
    objective drew, None if this step has no term.
    """

    idx: torch.Tensor
    targets: torch.Tensor
    num_targets: int | torch.Tensor = 1
    positions: torch.Tensor | None = None
    ends: torch.Tensor | None = None
    document: torch.Tensor | None = None
    pairs: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    group: torch.Tensor | None = None
    items: torch.Tensor | None = None
    total_items: int = 0
    labels: torch.Tensor | None = None
    drawn: dict | None = None

    def follows(self, n):
        """Whether token t + n of a row comes n tokens after token t in one document: (R, T - n)."""
        number, later = self.document[:, :-n], self.document[:, n:]
        follows = (number == later) & (number >= 0)
        if self.positions is not None:  # a branch may lie between two tokens of its trunk
            follows &= self.positions[:, n:] - self.positions[:, :-n] == n
        return follows

    def to(self, device):
        """This batch on the device, without waiting for it; what draw() needs stays behind."""
        moved = {
            name: to_device(getattr(self, name), device)
            for name in ("idx", "targets", "num_targets", "positions", "ends", "labels")
        }
        if self.drawn is not None:
            moved["drawn"] = {name: to_device(x, device) for name, x in self.drawn.items()}
        return Batch(**moved)


def to_device(x, device):
    if not torch.is_tensor(x):
        return x
    if device.type == "cuda" and not x.is_cuda:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def tree_mask(ends, flex=None, positions=None, window=None):
    """Which key a query sees in packed rows: those before it in whose subtree it lies.

    ends (R, T): the index after the last descendant of each token. flex: return a BlockMask for
    FlexAttention, by default on CUDA; otherwise a boolean (R, 1, T, T) for
    scaled_dot_product_attention. FlexAttention has no backward pass on a CPU. window: see no
    further back than that many positions (R, T), the query's own among them.
    """
    R, T = ends.shape
    if flex is None:
        flex = ends.is_cuda
    if flex:

        def visible(row, head, query, key):
            seen = (key <= query) & (query < ends[row, key])
            if window is not None:
                seen &= positions[row, query] - positions[row, key] < window
            return seen

        return create_block_mask(visible, R, None, T, T, device=ends.device)
    token = torch.arange(T, device=ends.device)
    seen = (token <= token[:, None]) & (token[:, None] < ends[:, None, :])
    if window is not None:
        seen &= positions[:, :, None] - positions[:, None, :] < window
    return seen[:, None]


def document_fragments(document):
    """First and last position (R, T) of the fragment that each token lies in, from its number."""
    R, T = document.shape
    position = torch.arange(T).expand(R, T)
    is_first = document.diff(dim=1, prepend=torch.full((R, 1), -1)) != 0
    first = torch.where(is_first, position, 0).cummax(1).values
    # A fragment ends before the next one begins, or with the row.
    is_last = torch.cat((is_first[:, 1:], torch.ones(R, 1, dtype=torch.bool)), 1)
    last = torch.where(is_last, position, T).flip(1).cummin(1).values.flip(1)
    return first, last


# ---- placing documents in rows


class Placed(NamedTuple):
    """Where the documents of an example lie: in which micro-batch, and their (row, column)."""

    micro_batch: int
    places: list


def first_fit(lengths, left, T):
    """[(row, column)] for documents of these lengths, the longest first, or None without room.

    left: the free tokens of each row of T tokens; it is updated. A document goes into the first
    row that has room for it.
    """
    places = [None] * len(lengths)
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        row = int((left >= lengths[n]).argmax())  # 0 if no row has room
        if left[row] < lengths[n]:
            return None
        places[n] = row, T - int(left[row])
        left[row] -= lengths[n]
    return places


def place_examples(examples, rows, T):
    """A Placed for each example: all its documents inside one micro-batch of `rows` rows.

    The longest example is placed first, each in the first micro-batch that has room. ValueError if
    one fits no empty micro-batch.
    """
    lengths = [[len(d) for d in e.documents] for e in examples]
    placed, used = [None] * len(examples), 0
    free = np.full((len(examples), rows), T)  # tokens of each row of each micro-batch
    for i in sorted(range(len(examples)), key=lambda i: -sum(lengths[i])):
        # Those in use that have room for the longest document, and a new one.
        for number in np.flatnonzero(free[: used + 1].max(1) >= max(lengths[i])).tolist():
            left = free[number].copy()
            places = first_fit(lengths[i], left, T)
            if places is not None:
                free[number], used = left, max(used, number + 1)
                placed[i] = Placed(number, places)
                break
        if placed[i] is None:
            raise ValueError(
                f"an example of {len(lengths[i])} documents, together {sum(lengths[i])} tokens, "
                f"does not fit a micro-batch of {rows} rows of {T}: lower GRAD_ACCUM_STEPS, or "
                "raise TRAIN_BATCH_TOKENS or TRAIN_SEQ_LEN"
            )
    return placed


class Item(NamedTuple):
    """An example in a micro-batch: its places there, its group, and its first pair's item."""

    example: Example
    places: list
    group: int
    first_item: int


def fill_rows(items, rows, T, filler, room=0):
    """The Batch of these Items in `rows` rows of T tokens.

    What is left of a row is a document of its own, of `filler` tokens without targets, all at
    position 0, so that it never passes a model's last position. room: pairs that the tables have
    place for, so that every micro-batch has one shape and one graph; at least as many as there are.
    num_targets and total_items are left to the caller.
    """
    idx, targets = np.full((rows, T), filler), np.full((rows, T), -1)
    positions, ends = np.zeros((rows, T), dtype=np.int64), np.full((rows, T), T)
    numbers, count, table = np.full((rows, T), -1), 0, []
    for item in items:
        starts = []
        for document, (row, column) in zip(item.example.documents, item.places, strict=True):
            document.write(column, idx[row], targets[row], positions[row], ends[row])
            numbers[row, column : column + len(document)] = count
            branch = column + document.fork + 1
            numbers[row, branch : branch + len(document.branch)] = count + 1
            count += 2
            starts.append(row * T + column)
        for n, ((i, a), (j, b)) in enumerate(item.example.pairs):
            table.append((starts[i] + a, starts[j] + b, item.group, item.first_item + n))
    padded = np.zeros((max(len(table), room), 4), dtype=np.int64)
    padded[: len(table)] = np.array(table, dtype=np.int64).reshape(-1, 4)
    a, b, group, items_of_pairs = torch.from_numpy(padded).T.contiguous()
    return Batch(
        torch.from_numpy(idx),
        torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        ends=torch.from_numpy(ends),
        document=torch.from_numpy(numbers),
        pairs=torch.stack((a, b)),
        weight=(torch.arange(len(padded)) < len(table)).float(),
        group=group,
        items=items_of_pairs,
    )


def rows_needed(examples, T):
    """Rows of T tokens that hold the documents of these examples, if any document may be in any."""
    lengths = [len(d) for e in examples for d in e.documents]
    return 1 + max(row for row, _ in first_fit(lengths, np.full(len(lengths), T), T))


def place_step(examples, T, max_rows, least=1):
    """(rows, [Placed]) of a step's examples in as few micro-batches as hold them, `least` or more.

    All micro-batches have the same number of rows, as few as will do, and at most max_rows, unless
    an example needs more.
    """
    largest = max(rows_needed([example], T) for example in examples)
    needed, max_rows = rows_needed(examples, T), max(max_rows, largest)
    for count in itertools.count(max(least, math.ceil(needed / max_rows))):
        for rows in range(max(largest, math.ceil(needed / count)), max_rows + 1):
            placed = place_examples(examples, rows, T)
            if max(place.micro_batch for place in placed) < count:
                return rows, placed


def pack_rows(examples, filler, T=0, first_item=0):
    """One micro-batch of all these examples, with as many rows as they need, for fine-tuning.

    T: tokens of a row; 0: as the longest document, rounded up to 8. With T given, the number of
    rows is a power of two: FlexAttention compiles each shape. The table of pairs has place for
    one at least, of weight 0 if there is none, so that every process uses the same weights.
    first_item: the number of the first pair in the step; total_items counts up to the last one.
    """
    lengths = [len(d) for e in examples for d in e.documents]
    fixed, T = T > 0, T or -(-max(lengths) // 8) * 8
    places = first_fit(lengths, np.full(len(lengths), T), T)
    rows = 1 + max(row for row, _ in places)
    if fixed:
        rows = 1 << (rows - 1).bit_length()
    items, places, number = [], iter(places), first_item
    for group, example in enumerate(examples):
        own = [next(places) for _ in example.documents]
        items.append(Item(example, own, group, number))
        number += len(example.pairs)
    batch = fill_rows(items, rows, T, filler, room=1)
    batch.total_items = max(number, first_item + 1)
    return batch
