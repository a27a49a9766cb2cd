"""What of an example is encoded, trained and compared, for people to look at.

A part is the trunk of the first document, number 0, or a branch of it or another document, numbered
from 1. A place is (part, index of a token in it).
"""

import json
import sys
from collections.abc import Callable
from typing import NamedTuple

LEGEND = "\033[32mtrained\033[0m, \033[7mcompared\033[0m, the others only read"


class Spelling(NamedTuple):
    """How tokens are shown: tokens(ids) as a list of texts, text(ids) as one text."""

    tokens: Callable
    text: Callable


class Part(NamedTuple):
    """Tokens that are encoded one after another.

    continues: the place after which a branch goes on, or None.
    """

    ids: list
    trained: list
    positions: list
    continues: tuple | None = None


def parts_of(example):
    """(the Parts of an Example, its pairs of places)."""
    parts, first = [], []
    for d in example.documents:
        first.append(len(parts))
        trained = [token in d.loss_on for token in range(len(d.trunk))]
        parts.append(Part(d.trunk, trained, [*range(len(d.trunk))]))
        if d.branch:
            positions = [*range(d.fork + 1, d.fork + 1 + len(d.branch))]
            untrained, fork = [False] * len(d.branch), (first[-1], d.fork)
            parts.append(Part(d.branch, untrained, positions, fork))

    def place(number, column):
        """A document is laid out depth first: a branch stands inside its trunk."""
        d, part = example.documents[number], first[number]
        if column <= d.fork or not d.branch:
            return part, column
        if column <= d.fork + len(d.branch):
            return part + 1, column - d.fork - 1
        return part, column - len(d.branch)

    return parts, [(place(*a), place(*b)) for a, b in example.pairs]


def to_json(example, spelling):
    """An Example as a dict for JSON; docs/finetuning.md says what its keys mean."""
    (trunk, *branches), compared = parts_of(example)
    shown = show_part(trunk, spelling)
    shown["branches"] = [
        {"continues": part.continues, **show_part(part, spelling)} for part in branches
    ]
    shown["compared"] = compared
    if example.no_term:
        shown["no_term"] = example.no_term
    return shown


def show_part(part, spelling):
    return {
        "text": spelling.text(part.ids),
        "tokens": spelling.tokens(part.ids),
        "ids": list(part.ids),
        "trained": part.trained,
        "positions": part.positions,
    }


def to_colours(example, spelling):
    """An Example as lines for a terminal."""
    parts, compared = parts_of(example)
    marked = {place for pair in compared for place in pair}
    for n, part in enumerate(parts):
        head = f"part {n}"
        if part.continues:
            head += " continues part {} after token {}".format(*part.continues)
        styles = [(trains, (n, i) in marked) for i, trains in enumerate(part.trained)]
        yield f"\033[1m{head}\033[0m\n{paint(part.ids, styles, spelling)}"
    for a, b in compared:
        yield "compared: token {1} of part {0} with token {3} of part {2}".format(*a, *b)
    if example.no_term:
        yield f"no JEPA term: {example.no_term}"


def paint(ids, styles, spelling):
    """The text of tokens in colours; styles: (trained, compared) of each."""
    text, begin = "", 0
    for end in range(1, len(ids) + 1):
        # Tokens of one style together: a character may be spread over several.
        if end < len(ids) and styles[end] == styles[begin]:
            continue
        trains, marks = styles[begin]
        colour = "\033[32m" * trains + "\033[7m" * marks
        piece = printable(spelling.text(ids[begin:end]))
        if marks:  # a line break would not be seen
            piece = piece.replace("\n", "\\n")
        text += f"{colour}{piece}\033[0m" if colour else piece
        begin = end
    return text


def printable(text):
    """The text, with escapes for what would steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def show(examples, spelling, say):
    """Say Examples: as a line of JSON each, or in colours on a terminal."""
    if not sys.stdout.isatty():
        for example in examples:
            say(json.dumps(to_json(example, spelling)))
        return
    say(LEGEND)
    for n, example in enumerate(examples, 1):
        say(f"\n\033[1mexample {n}\033[0m")
        for line in to_colours(example, spelling):
            say(line)
