"""The paired-view objective: a text predicts another one of the same meaning.

The trunk of a pair (Text, Code) is Text followed by Code. View A is the state at the last of k
[PRED] tokens, a branch that continues Text and that the trunk doesn't see. View B is the state at
the last token of Code, encoded alone. In a group of paraphrases each predicts the next.
Source: LLM-JEPA, arXiv 2509.14252.
"""

from dataclasses import replace

from nanojepa.objectives.distance import Views
from nanojepa.objectives.objective import Objective
from nanojepa.packing import Example


class Pair(Objective):
    default_normed = True
    needs_pairs = True

    def layout(self, texts):
        example = Example(list(texts.documents))
        for a, b in self.ways(texts):
            if self.options.reverse:
                a, b = b, a
            place_a, branch = self.place(a, self.options.preds)
            place_b, _ = self.place(b, ())
            if texts.is_cut(place_a) or texts.is_cut(place_b):
                example.no_term = "a view is cut off by max_length"
                break
            example.add_pair(place_a, place_b, branch)
        if not example.pairs and not example.no_term:
            example.no_term = self.without_ways
        return example

    without_ways = "it has no two texts of one meaning"

    def ways(self, texts):
        """Which view predicts which: pairs of Views."""
        return texts.meaning

    def place(self, view, preds):
        """The place of a view's state, and the branch tokens that are encoded to get there.

        The place is (document, token) if a document of the example begins with the view, and
        otherwise the tokens to encode for it.
        """
        options = self.options
        if options.front and preds:
            tokens = view.tokens[: view.first] + list(preds) + view.tokens[view.first :]
            view, preds = replace(view, tokens=tokens, document=None), ()
        turn = [*view.tokens, *preds, *view.tail]
        last = len(view.tokens) + len(preds) - 1
        if options.last_token:
            last = len(turn) + options.last_token
            if last < 0:
                raise ValueError(
                    f"training.last_token={options.last_token}: a view has {len(turn)} tokens; "
                    "count fewer from its end"
                )
        if view.document is None:
            return turn[: last + 1], ()
        if last < len(view.tokens) or not preds:
            return (view.document, last), ()
        return (view.document, len(view.tokens) - 1), turn[len(view.tokens) : last + 1]

    def views(self, lm, batch, states, drawn):
        u = self.gather(states, drawn["a"])
        v = self.gather(states, drawn["b"])
        return Views(u, v, group=drawn["group"])
