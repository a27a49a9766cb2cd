"""The pairs or groups of one split as arrays: which views each has, and how long its trunks are.

In the shards an example is marker, view, separator, view, and so on. The trunk of a pair is marker,
Text, separator, Code, marker. Every text of a group is a trunk of its own: marker, text, marker.
"""

import numpy as np

from nanojepa.records import PRED_TOKENS

SHORTEST_ROW = PRED_TOKENS + 6  # two markers, a separator, and some text


class ExampleSet:
    """Examples, views of texts. name: of the set, for messages; paired: pairs, no groups.

    cut, skipped: how many fit_rows() has shortened and left out.
    """

    cut = skipped = 0

    def __init__(self, shards, marker, separator, name, paired):
        self.name, self.paired, self.tokens = name, paired, np.concatenate(shards)
        tokens = self.tokens
        bounds = np.flatnonzero((tokens == marker) | (tokens == separator))
        self.start, self.length = bounds + 1, np.diff(bounds, append=len(tokens)) - 1
        # first: the number of the first view of each example, and at the end that of all views
        self.first = np.append(np.flatnonzero(tokens[bounds] == marker), len(bounds))
        whole = len(bounds) and bounds[0] == 0 and tokens[0] == marker and self.length.min() > 0
        counts = self.counts()
        if not whole or counts.min() < 2 or (paired and counts.max() > 2):
            raise ValueError(
                f"{name}: the shards don't hold {'pairs' if paired else 'groups'} of texts; remove "
                "the folder and make the data again with data/prepare_pairs.py"
            )

    def __len__(self):
        return len(self.first) - 1

    def views(self, example):
        """The tokens of an example's views, lists."""
        views = range(self.first[example], self.first[example + 1])
        return [self.tokens[self.start[v] : self.start[v] + self.length[v]].tolist() for v in views]

    def counts(self):
        """Views of each example."""
        return np.diff(self.first)

    def documents(self):
        """(tokens of every trunk, the number of each example's first trunk)."""
        if self.paired:  # with two markers and the separator
            views = np.add.reduceat(self.length, self.first[:-1])
            return views + 3, np.arange(len(self))
        return self.length + 2, self.first[:-1]

    def trunks(self):
        """Trunk tokens of each example: those that the cross entropy is about."""
        return np.add.reduceat(*self.documents())

    def longest(self):
        """Tokens of each example's longest document, with as many [PRED]s as there can be."""
        return np.maximum.reduceat(*self.documents()) + PRED_TOKENS

    def keep(self, chosen):
        """Drop the examples that are not in chosen, a boolean array."""
        views = np.repeat(chosen, self.counts())
        first = np.concatenate(([0], np.cumsum(self.counts()[chosen])))
        self.start, self.length, self.first = self.start[views], self.length[views], first

    def fit_rows(self, T, way):
        """Stop at examples that no row of T tokens can hold, or skip or truncate them.

        way: LONG_EXAMPLES. Room for the most [PRED] tokens is left, so that all arms have the same
        examples. Returns a list of warnings.
        """
        long, needed = self.longest() > T, self.longest().max()
        if not long.any():
            return []
        what = f"{long.sum():,} of {len(self):,} {self.name} don't fit a row of TRAIN_SEQ_LEN={T}"
        if way == "stop":
            raise ValueError(
                f"{what}: choose LONG_EXAMPLES=skip or truncate, or TRAIN_SEQ_LEN={needed}"
            )
        if T < SHORTEST_ROW or (way == "skip" and long.all()):
            raise ValueError(f"{what}, so none is left: raise TRAIN_SEQ_LEN to {needed}")
        if way == "skip":
            self.keep(~long)
            self.skipped = int(long.sum())
            return [f"{what}: skipped (LONG_EXAMPLES)"]
        self.truncate(long, T - PRED_TOKENS)
        self.cut = int(long.sum())
        return [f"{what}: truncated (LONG_EXAMPLES)"]

    def truncate(self, long, longest):
        """Cut the tail of the longer view of these examples; the end token stays."""
        if self.paired:
            room, text, code = longest - 3, self.length[0::2], self.length[1::2]
            cut = np.minimum(text, np.maximum(room - code, room // 2))
            text[:] = np.where(long, cut, text)
            code[:] = np.where(long, np.minimum(code, room - text), code)
        else:
            np.minimum(self.length, longest - 2, out=self.length)
