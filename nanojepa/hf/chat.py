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
# Without a chat template: the texts in lines of their own. A start and an end token come on top.
PLAIN = "{% for m in messages %}{{ m.content }}{{ '\n' if m.role != 'assistant' }}{% endfor %}"


def remove_thinking(text):
    """The text without <think> and <Thought> passages, and without <Output> and <Answer> tags."""
    for name in ("think", "Thought"):
        # Up to the last closing tag every opening one has its end, so the time is linear.
        begin, close, rest = text.rpartition(f"</{name}>")
        text = re.sub(f"<{name}>.*?</{name}>", "", begin + close, flags=re.DOTALL) + rest
    return re.sub("</?(Output|Answer)>", "", text).strip()


class Turns(NamedTuple):
    """The tokens of a conversation.

    user, assistant: the range of tokens that hold each text, empty if there is no such message.
    user_tail, assistant_tail: the tokens that close each turn. said: the assistant's text as the
    template writes it.
    """

    tokens: list
    user: range
    user_tail: list
    assistant: range = range(0)
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
        self.before_all = [self.start] if plain else []  # a template writes its own
        added = tokenizer.added_tokens_decoder.items()
        self.special = {*tokenizer.all_special_ids, *(n for n, token in added if token.special)}
        self.closing = self.pieces([("user", "u")]).own[-1]  # of the user's turn
        self.takes_system = self.has_system_role()
        self.end = self.conversation(None, "u", "a").tokens[-1]
        self.stop_tokens = sorted({self.end, eos})
        asked = self.apply(["user"], ["u"], add_generation_prompt=True)
        self.prompt_differs = self.prompt(None, "u") != [*self.before_all, *self.encode(asked)]

    def encode(self, text):
        """The tokens of a text, without any special ones around it."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_places(self, text, spans, before=()):
        """The tokens of a text, and for each (start, stop) of its characters their tokens' range.

        A token that holds characters on both sides of a boundary belongs to both. before: tokens
        that precede the text's.
        """
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        places = []
        for start, stop in spans:
            offsets = enumerate(encoding["offset_mapping"], len(before))
            held = [n for n, (first, end) in offsets if first < stop and end > start]
            places.append(range(held[0], held[-1] + 1) if held else range(0))
        return [*before, *encoding["input_ids"]], places

    def apply(self, roles, texts, **options):
        """What the template makes of these messages, as text."""
        messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        return self.tokenizer.apply_chat_template(
            messages, chat_template=PLAIN if self.plain else None, tokenize=False, **options
        )

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
        """Whether the template takes a system message."""
        try:
            self.pieces([("system", "s"), ("user", "u"), ("assistant", "a")])
        except ValueError:
            return False
        return True

    def turns(self, messages):
        """The Turns of (role, text) messages. One of the assistant ends with the end token.

        A single message makes a conversation of its own, as LLM-JEPA encodes a view.
        """
        own, texts = self.pieces(messages)
        before, begin, stop = own[0], 0, 0  # all before the assistant's text, the user's in it
        for (role, _), text, after in zip(messages, texts, own[1:], strict=True):
            if role == "user":
                begin, stop = len(before), len(before) + len(text)
            if role != "assistant":
                before += text + after
        tail_stop = stop + len(self.closing)
        if not before.startswith(self.closing, stop):
            tail_stop = len(before)
        tokens, (user, tail) = self.encode_places(
            before, [(begin, stop), (stop, tail_stop)], self.before_all
        )
        # The text's last token may also hold the beginning of the tail.
        asked = Turns(tokens, user, tokens[user.stop : tail.stop])
        if messages[-1][0] != "assistant":
            return asked
        answer, closing = self.encode(texts[-1]), self.encode(own[-1])
        ends = [n for n, token in enumerate(closing) if token in self.special]
        if not ends:
            closing, ends = [self.tokenizer.eos_token_id], [0]
        return asked._replace(
            tokens=[*tokens, *answer, *closing[: ends[0] + 1]],
            assistant=range(len(tokens), len(tokens) + len(answer)),
            assistant_tail=closing,
            said=texts[-1],
        )

    def conversation(self, system, user, assistant):
        """The Turns of a whole conversation.

        If the template refuses a system message, its text stands at the beginning of the user's.
        """
        messages = [("user", user), ("assistant", assistant)]
        if system and self.takes_system:
            messages.insert(0, ("system", system))
        elif system:
            messages[0] = ("user", f"{system}\n\n{user}")
        return self.turns(messages)

    def prompt(self, system, user):
        """The tokens from which the assistant's text is generated."""
        turns = self.conversation(system, user, "a")
        return turns.tokens[: turns.assistant[0]]
