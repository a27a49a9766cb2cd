"""Documents, rows and places against slow references that go token by token."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanojepa.packing import (
    Batch,
    Document,
    Example,
    Item,
    Texts,
    fill_rows,
    first_fit,
    pack_rows,
    place_examples,
    place_step,
    rows_needed,
    tree_mask,
)

FILLER = 999
CPU = torch.device("cpu")


class Token(NamedTuple):
    """A token of a document, in the order in which it lies in a row."""

    value: int
    target: int
    position: int
    sees: list  # the places in the document that it sees, itself the last


def written_out(document):
    """The Tokens of a document, from what a tree is: a token sees its path from the root."""
    inner = document.fork + 1
    trunk = [("trunk", i) for i in range(len(document.trunk))]
    branch = [("branch", i) for i in range(len(document.branch))]
    order = trunk[:inner] + branch + trunk[inner:]
    tokens = []
    for part, i in order:
        path, target = trunk[: i + 1], -1
        if part == "branch":
            path = trunk[:inner] + branch[: i + 1]
        elif i + 1 in document.loss_on:
            target = document.trunk[i + 1]
        value, sees = getattr(document, part)[i], [order.index(place) for place in path]
        tokens.append(Token(value, target, len(path) - 1, sees))
    return tokens


@st.composite
def documents(draw, longest=6):
    """A Document of any shape; its tokens may repeat."""
    trunk = draw(st.lists(st.integers(0, 20), min_size=1, max_size=longest))
    branch = draw(st.lists(st.integers(21, 30), max_size=4))
    fork = draw(st.integers(0, len(trunk) - 1)) if branch else 0
    loss_on = range(draw(st.integers(1, len(trunk))), len(trunk))
    return Document(trunk, loss_on, branch, fork)


@st.composite
def examples(draw):
    """An Example of one to three documents and some pairs of places in them."""
    own = draw(st.lists(documents(), min_size=1, max_size=3))

    def place():
        number = draw(st.integers(0, len(own) - 1))
        return number, draw(st.integers(0, len(own[number]) - 1))

    return Example(own, [(place(), place()) for _ in range(draw(st.integers(0, 3)))])


def columns_of(document):
    """How many tokens of a row it takes, counted one by one."""
    return len(written_out(document))


# ---- one document


@given(documents(), st.integers(0, 4))
@settings(max_examples=100, deadline=None)
def test_a_document_is_written_as_its_tree(document, column):
    size = column + columns_of(document) + 2
    rows = [np.full(size, fill) for fill in (FILLER, -1, -7, -8)]
    idx, targets, positions, ends = rows
    before = [row.copy() for row in rows]
    document.write(column, *rows)
    tokens = written_out(document)
    inside = slice(column, column + len(tokens))
    assert idx[inside].tolist() == [t.value for t in tokens]
    assert targets[inside].tolist() == [t.target for t in tokens]
    assert positions[inside].tolist() == [t.position for t in tokens]
    for place, end in enumerate(ends[inside]):
        last = max(other for other, t in enumerate(tokens) if place in t.sees)
        assert end == column + last + 1
    for row, old in zip(rows, before, strict=True):
        outside = np.delete(np.arange(size), range(column, column + len(tokens)))
        assert (row[outside] == old[outside]).all()
    assert len(document) == len(tokens)
    assert document.visible_pairs() == sum(len(t.sees) for t in tokens)


# ---- the mask


def written_rows(placed, rows, T):
    """(the places of documents by first_fit, the Batch)."""
    places = first_fit([len(d) for d in placed], np.full(rows, T), T)
    return places, fill_rows([Item(Example(placed), places, 0, 0)], rows, T, FILLER)


@given(st.lists(documents(), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_mask_is_the_tree_and_nothing_else(packed):
    """A token is seen by itself and by what continues it, in its own document only.

    What is left of a row is a document too.
    """
    rows, T = len(packed), 12
    places, batch = written_rows(packed, rows, T)
    idx, targets, positions, ends = batch.idx, batch.targets, batch.positions, batch.ends
    expected = torch.zeros(rows, T, T, dtype=torch.bool)
    filled = [0] * rows
    for document, (row, column) in zip(packed, places, strict=True):
        for query, token in enumerate(written_out(document)):
            expected[row, column + query, [column + key for key in token.sees]] = True
        filled[row] += columns_of(document)
    for row, first in enumerate(filled):
        expected[row, first:, first:] = torch.ones(T - first, T - first).tril().bool()
        assert (idx[row, first:] == FILLER).all() and (targets[row, first:] == -1).all()
        assert not positions[row, first:].any()  # no position that a model may lack
    assert torch.equal(tree_mask(ends)[:, 0], expected)


def test_the_block_mask_is_the_boolean_one():
    """FlexAttention's mask, evaluated for every query and key."""
    tree = Document([1, 2, 3], range(1, 3), [7, 8], 1)
    ends = written_rows([tree, Document([4, 5])], 1, 12)[1].ends
    blocks = tree_mask(ends, flex=True)
    places = torch.arange(12)
    seen = [[blocks.mask_mod(0, 0, q, k).item() for k in places] for q in places]
    assert seen == tree_mask(ends)[0, 0].tolist()


# ---- places


def first_fit_slowly(lengths, free):
    """As first_fit, with a list of lists: free[row] holds the columns that are left."""
    places = {}
    for n in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        for row, columns in enumerate(free):
            if len(columns) >= lengths[n]:
                places[n] = row, columns[0]
                del columns[: lengths[n]]
                break
        else:
            return None
    return [places[n] for n in range(len(lengths))]


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_a_document_goes_into_the_first_row_with_room(lengths, room):
    left, free = np.array(room), [list(range(9 - n, 9)) for n in room]
    places = first_fit(lengths, left, 9)
    assert places == first_fit_slowly(lengths, free)
    if places is not None:
        assert left.tolist() == [len(columns) for columns in free]


def place_slowly(lengths, rows, T):
    """As place_examples: every micro-batch is tried, without a look at what it has left."""
    micro_batches, placed = [], {}
    for i in sorted(range(len(lengths)), key=lambda i: (-sum(lengths[i]), i)):
        for number in range(len(micro_batches) + 1):
            if number == len(micro_batches):
                micro_batches.append([list(range(T)) for _ in range(rows)])
            free = [list(columns) for columns in micro_batches[number]]
            places = first_fit_slowly(lengths[i], free)
            if places is not None:
                micro_batches[number], placed[i] = free, (number, places)
                break
    return [placed[i] for i in range(len(lengths))]


@given(st.lists(examples(), min_size=1, max_size=12), st.integers(3, 4))
@settings(max_examples=100, deadline=None)
def test_an_example_goes_into_the_first_micro_batch_with_room_for_all_of_it(several, rows):
    T = 10
    placed = place_examples(several, rows, T)
    lengths = [[columns_of(d) for d in e.documents] for e in several]
    assert [tuple(p) for p in placed] == place_slowly(lengths, rows, T)
    taken = set()
    for own, (micro_batch, places) in zip(lengths, placed, strict=True):
        for length, (row, column) in zip(own, places, strict=True):
            assert 0 <= row < rows and 0 <= column <= T - length
            columns = {(micro_batch, row, c) for c in range(column, column + length)}
            assert not columns & taken
            taken |= columns


def test_an_example_that_fits_no_micro_batch_is_refused():
    example = Example([Document([0] * 20) for _ in range(3)])
    assert place_examples([example], 3, 32)[0].places == [(0, 0), (1, 0), (2, 0)]
    message = "3 documents, together 60 tokens, does not fit a micro-batch of 2 rows of 32: lower"
    with pytest.raises(ValueError, match=message):
        place_examples([example], 2, 32)


# ---- batches


def check_batch(batch, several, places, groups, first_items):
    """Every pair of a Batch against the documents written out, one by one."""
    T, n, starts = batch.idx.size(1), 0, iter(places)
    for example, group, first in zip(several, groups, first_items, strict=True):
        own = [next(starts) for _ in example.documents]
        for number, pair in enumerate(example.pairs):
            for side, (document, token) in enumerate(pair):
                row, column = own[document]
                assert batch.pairs[side, n] == row * T + column + token
                value = written_out(example.documents[document])[token].value
                assert batch.idx.flatten()[batch.pairs[side, n]] == value
            assert batch.weight[n] == 1
            assert batch.group[n] == group and batch.items[n] == first + number
            n += 1
    assert not batch.weight[n:].any() and not batch.pairs[:, n:].any()
    values = [t.value for e in several for d in e.documents for t in written_out(d)]
    assert sorted(batch.idx[batch.idx != FILLER].tolist()) == sorted(values)


@given(st.lists(examples(), max_size=4), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_a_micro_batch_holds_its_examples_and_their_pairs(several, room):
    """An empty one too: the last micro-batches of a step may be."""
    rows, T = 12, 10
    placed = place_examples(several, rows, T)  # they all fit the first micro-batch
    groups, first_items = [7 + n for n in range(len(several))], [3 * n for n in range(len(several))]
    items = [
        Item(e, p.places, group, first)
        for e, p, group, first in zip(several, placed, groups, first_items, strict=True)
    ]
    batch = fill_rows(items, rows, T, FILLER, room)
    count = sum(len(e.pairs) for e in several)
    assert batch.idx.shape == batch.targets.shape == batch.positions.shape == (rows, T)
    assert batch.pairs.shape == (2, max(room, count)) and batch.weight.sum() == count
    assert {x.dtype for x in (batch.idx, batch.targets, batch.positions, batch.ends)} == {
        torch.int64
    }
    places = [place for p in placed for place in p.places]
    check_batch(batch, several, places, groups, first_items)


@given(st.lists(examples(), min_size=1, max_size=6), st.sampled_from([0, 16]), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_one_micro_batch_of_all_examples_for_fine_tuning(several, T, first_item):
    batch = pack_rows(several, FILLER, T, first_item)
    rows, columns = batch.idx.shape
    lengths = [columns_of(d) for e in several for d in e.documents]
    free = [list(range(columns)) for _ in lengths]
    places = first_fit_slowly(lengths, free)
    used = 1 + max(row for row, _ in places)
    if T:
        assert columns == T and rows & (rows - 1) == 0 and rows // 2 < used <= rows
    else:
        assert columns % 8 == 0 and columns - 8 < max(lengths) <= columns and rows == used
    counts = [len(e.pairs) for e in several]
    first_items = first_item + np.cumsum([0, *counts])[:-1]
    check_batch(batch, several, places, range(len(several)), first_items)
    assert batch.weight.sum() == sum(counts) and len(batch.weight) == max(1, sum(counts))
    assert batch.total_items == first_item + max(1, sum(counts))


@given(
    st.lists(examples(), min_size=1, max_size=8),
    st.integers(16, 40),
    st.integers(1, 4),
    st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_a_step_in_as_few_micro_batches_of_few_rows_as_hold_it(several, T, max_rows, least):
    rows, placed = place_step(several, T, max_rows, least)
    largest = max(rows_needed([example], T) for example in several)
    assert rows <= max(max_rows, largest)
    held = {}
    for example, (number, places) in zip(several, placed, strict=True):
        for document, (row, column) in zip(example.documents, places, strict=True):
            assert 0 <= row < rows
            taken = {(row, column + n) for n in range(len(document))}
            assert max(column for _, column in taken) < T
            assert not taken & held.setdefault(number, set())
            held[number] |= taken
    count, tokens = 1 + max(held), sum(len(d) for e in several for d in e.documents)
    assert count * rows * T >= tokens
    # One micro-batch fewer, with all the rows that are allowed, doesn't hold them.
    if count > least:
        again = place_examples(several, max(max_rows, largest), T)
        assert max(place.micro_batch for place in again) + 1 >= count


def test_what_draw_needs_stays_on_the_host():
    batch = pack_rows([Example([Document([1, 2, 3], range(1, 3))], [((0, 0), (0, 2))])], FILLER)
    batch.drawn = {"weight": batch.weight}
    moved = batch.to(CPU)
    assert moved.pairs is moved.weight is moved.group is moved.items is None
    assert torch.equal(moved.idx, batch.idx) and torch.equal(moved.ends, batch.ends)
    assert torch.equal(moved.drawn["weight"], batch.weight) and moved.num_targets == 1
    plain = Batch(batch.idx, batch.targets).to(CPU)
    assert plain.ends is plain.positions is plain.drawn is None


# ---- examples


def test_a_place_is_a_document_s_token_or_a_text_of_its_own():
    trunk = Document([1, 2, 3, 4], range(1, 4))
    example = Example([trunk])
    example.add_pair((0, 1), [7, 8], branch=[20, 21])
    assert example.documents[0] == Document([1, 2, 3, 4], range(1, 4), [20, 21], 1)
    assert example.documents[1] == Document([7, 8])
    assert example.pairs == [((0, 3), (1, 1))]  # a branch lies after its fork
    assert trunk.branch == []  # arms share the trunks
    assert example.without_term() == Example([trunk])


def test_a_place_beyond_the_end_is_cut_and_so_is_a_text_that_is_too_long():
    texts = Texts([Document([1, 2, 3])], longest=3)
    assert [texts.is_cut(p) for p in ((0, 2), (0, 3), [4, 5, 6], [4, 5, 6, 7])] == [
        False,
        True,
        False,
        True,
    ]
    assert not Texts([]).is_cut([0] * 99)
