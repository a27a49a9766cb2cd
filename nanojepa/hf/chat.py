"""Conversations as tokens, with the place of each message's text.

Places are never found by searching for tokens. A chat template is applied to placeholders first,
which gives its own texts between the messages, so the characters of each message are known; a fast
tokenizer says which characters a token holds. The assistant's text is tokenised apart from what
precedes it, as generation from prompt() does.

A conversation has at most one system message, one user message and one assistant message.
"""

import itertools
import re
from typing import NamedTuple

from jinja2 import TemplateError

# Private-use characters, which no template trims or splits.
PLACEHOLDER = "\ue000{}\ue001"
PLACEHOLDERS = re.compile("\ue000(\\d+)\ue001")
TAG = re.compile("<(think|Thought)>|</?(?:Output|Answer)>")


def remove_thinking(text):
    """The text without <think> and <Thought> passages, and without <Output> and <Answer> tags.

    The time grows with the text's length: a closing tag that is missing is looked for only once.
    """
    kept, begin, position, unclosed = [], 0, 0, set()
    while tag := TAG.search(text, position):
        position = tag.end()
        if name := tag[1]:
            close = -1 if name in unclosed else text.find(f"</{name}>", position)
            if close < 0:
                unclosed.add(name)
                continue
            position = close + len(f"</{name}>")
        kept.append(text[begin : tag.start()])
        begin = position
    return ("".join(kept) + text[begin:]).strip()


class Turns(NamedTuple):
    """The tokens of a conversation.

    user, assistant: the range of tokens that hold each text, None if there is no such message.
    user_tail, assistant_tail: the template's tokens that close each turn. said: the assistant's
    text as the template writes it.
    """

    tokens: list
    user: range | None = None
    assistant: range | None = None
    user_tail: tuple = ()
    assistant_tail: tuple = ()
    said: str = ""


class Pieces(NamedTuple):
    """What a template makes of n messages: n + 1 texts of its own, and the messages' n texts."""

    own: list
    texts: list


class Chat:
    """How a tokenizer writes a conversation.

    plain: without its template; the two texts, a line break between them, and an end token.
    ValueError if the tokenizer can't say which characters its tokens hold, or has no template.

    start: the token before a text that is encoded alone. end: the trained token that closes the
    assistant's turn. stop_tokens: where generation stops. prompt_differs: whether the template's
    generation prompt is not what precedes the assistant's text in a conversation.
    """

    def __init__(self, tokenizer, plain=False):
        self.tokenizer, self.plain = tokenizer, plain
        name = tokenizer.name_or_path
        if not tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer {name} is a slow one, which doesn't tell where its tokens stand; "
                "use a model with a fast tokenizer"
            )
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer {name} has no end token; set its eos_token")
        if not plain and not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer {name} has no chat template; choose dataset.plain: true"
            )
        eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.start = eos if bos is None else bos
        added = tokenizer.added_tokens_decoder.items()
        self.special = {*tokenizer.all_special_ids, *(n for n, token in added if token.special)}
        self.takes_system = not plain and self.has_system_role()
        self.end = self.conversation(None, "u", "a").assistant_tail[-1]
        self.stop_tokens = sorted({self.end, eos})
        self.prompt_differs = not plain and self.prompt(None, "u") != self.generation_prompt("u")

    def encode(self, text):
        """The tokens of a text, without any special ones around it."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_places(self, text, spans):
        """The tokens of a text, and for each (start, stop) of its characters their tokens' range.

        A token that holds characters on both sides of a boundary belongs to both.
        """
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        places = []
        for start, stop in spans:
            offsets = enumerate(encoding["offset_mapping"])
            held = [n for n, (first, end) in offsets if first < stop and end > start]
            places.append(range(held[0], held[-1] + 1) if held else range(0))
        return encoding["input_ids"], places

    def apply(self, roles, texts, **options):
        """What the template makes of these messages, as text."""
        messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)

    def pieces(self, messages):
        """The Pieces of (role, text) messages.

        A template may strip the whitespace at a text's ends. ValueError if it changes more, or
        refuses the messages.
        """
        roles, texts = zip(*messages, strict=True)
        try:
            parts = PLACEHOLDERS.split(
                self.apply(roles, map(PLACEHOLDER.format, range(len(texts))))
            )
        except TemplateError as e:
            raise ValueError(
                f"the chat template refuses messages of {' and '.join(roles)} ({e}); "
                "choose dataset.plain: true" + ", or dataset.views: prefix" * (len(roles) == 1)
            ) from None
        own, order = parts[::2], parts[1::2]
        if order != [str(n) for n in range(len(texts))]:
            raise ValueError(
                "the chat template doesn't write every message once and in order; "
                "choose dataset.plain: true"
            )
        whole = self.apply(roles, texts)
        for written in itertools.product(*((text, text.strip()) for text in texts)):
            if own[0] + "".join(t + o for t, o in zip(written, own[1:], strict=True)) == whole:
                return Pieces(own, written)
        raise ValueError(
            "the chat template rewrites a message's text, so its place is not known; "
            "choose dataset.plain: true"
        )

    def has_system_role(self):
        try:
            self.pieces([("system", "s"), ("user", "u"), ("assistant", "a")])
        except ValueError:
            return False
        return True

    def before_assistant(self, system, user):
        """The (role, text) messages before the assistant's.

        If the template refuses a system message, its text stands at the beginning of the user's.
        """
        if not system:
            return [("user", user)]
        if self.takes_system:
            return [("system", system), ("user", user)]
        return [("user", system + ("\n" if self.plain else "\n\n") + user)]

    def prompt(self, system, user):
        """The tokens from which the assistant's text is generated."""
        turns = self.conversation(system, user, "a")
        return turns.tokens[: turns.assistant[0]]

    def generation_prompt(self, user):
        """The tokens of the template's own generation prompt."""
        return self.encode(self.apply(["user"], [user], add_generation_prompt=True))

    def conversation(self, system, user, assistant):
        """The Turns of a whole conversation; it ends with the end token."""
        messages = self.before_assistant(system, user)
        if self.plain:
            return self.plain_conversation(messages[0][1], assistant)
        own, texts = self.pieces([*messages, ("assistant", assistant)])
        begin = len(own[0])
        if len(messages) == 2:
            begin += len(texts[0]) + len(own[1])
        stop = begin + len(texts[-2])
        before = "".join(itertools.chain(*zip(own[:-1], texts[:-1] + ("",), strict=True)))
        # What the template writes after the user's text if that is the last, closes its turn.
        closing = self.pieces(messages).own[-1]
        tail_stop = stop + len(closing) if own[-2].startswith(closing) else len(before)
        prompt, (user_place, tail) = self.encode_places(before, [(begin, stop), (stop, tail_stop)])
        answer, ending = self.encode(texts[-1]), self.ending(own[-1])
        return Turns(
            [*prompt, *answer, *ending],
            user_place,
            range(len(prompt), len(prompt) + len(answer)),
            # The text's last token may also hold the beginning of the tail.
            prompt[user_place.stop : tail.stop],
            ending,
            texts[-1],
        )

    def plain_conversation(self, user, assistant):
        """The Turns of a conversation without a template."""
        asked, line_break, answer = map(self.encode, (user, "\n", assistant))
        before, end = [self.start, *asked, *line_break], [self.tokenizer.eos_token_id]
        return Turns(
            [*before, *answer, *end],
            range(1, 1 + len(asked)),
            range(len(before), len(before) + len(answer)),
            line_break,
            end,
            assistant,
        )

    def ending(self, text):
        """The tokens of the text that closes the assistant's turn, up to the first special one.

        Without a special one, the end token alone.
        """
        tokens = self.encode(text)
        special = [n for n, token in enumerate(tokens) if token in self.special]
        return tokens[: special[0] + 1] if special else [self.tokenizer.eos_token_id]

    def alone(self, role, text):
        """The Turns of one message in a conversation of its own, as LLM-JEPA encodes a view.

        role: user or assistant. ValueError if the template refuses it.
        """
        own, (written,) = self.pieces([(role, text)])
        tokens, (place,) = self.encode_places(
            own[0] + written, [(len(own[0]), len(own[0]) + len(written))]
        )
        tail = self.encode(own[1])
        return Turns([*tokens, *tail], **{role: place, f"{role}_tail": tail})
