"""Conversations as tokens, with the place of each message's text.

A conversation is written by its chat template and encoded at once, as apply_chat_template() does,
but control tokens come from the template alone: a message that spells one is encoded as plain text.

Places are never found by searching for tokens. The template is applied to placeholders first, which
gives its own texts between the messages, so the characters of each message are known; a fast
tokenizer says which characters a token holds.

A conversation has at most one system message, one user message and one assistant message.
"""

import datetime
import itertools
import json
import os
import random
import re
from typing import NamedTuple
from unittest import mock

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers.utils import chat_template_utils

# Private-use characters, which no template trims or splits.
PLACEHOLDER = "\ue000{}\ue001"
PLACEHOLDERS = re.compile("\ue000(\\d+)\ue001")
PRIVATE = range(0xF0000, 0xFFFFE)  # another block of them, for control tokens
# Without a chat template: the texts in lines of their own. A start and an end token come on top.
PLAIN = "{% for m in messages %}{{ m.content }}{{ '\n' if m.role != 'assistant' }}{% endfor %}"
# No control tokens, though some templates write them: what an assistant thinks is its own text.
THINKING = ("<think>", "</think>")
DATE = "2024-07-26"  # what Llama's templates write without a clock


# ---- what a conversation is


class Turns(NamedTuple):
    """The tokens of a conversation, and which characters (start, stop) of it each one holds.

    user, assistant: the range of tokens that hold each text, empty if there is no such message.
    user_tail, assistant_tail: the tokens that close each turn. labels: the range of tokens that
    the assistant has to write, from the generation prompt's end to the end token. said: the
    assistant's text as the template writes it, which begins at the character said_at.
    """

    tokens: list
    offsets: list
    user: range
    user_tail: list
    assistant: range = range(0)
    assistant_tail: tuple = ()
    labels: range = range(0)
    said: str = ""
    said_at: int = 0

    def holding(self, start, stop):
        """The range of tokens that hold a character of start..stop.

        A token that holds characters on both sides of a boundary belongs to both.
        """
        held = [n for n, (a, b) in enumerate(self.offsets) if a < stop and b > start]
        return range(held[0], held[-1] + 1) if held else range(0)


class Form(NamedTuple):
    """How a template writes messages of given roles.

    own: its own texts before, between and after the messages'. opening: how many characters of the
    one before the assistant's text the generation prompt has.
    """

    own: list
    opening: int = 0


class Written(NamedTuple):
    """A conversation as text.

    texts: lie one after another; the first, third, .. are the template's, the others the messages'.
    begin: the character after the generation prompt.
    """

    texts: list
    begin: int = 0

    def place(self, n):
        """The characters (start, stop) of a text."""
        ends = list(itertools.accumulate(map(len, self.texts), initial=0))
        return ends[n], ends[n + 1]

    def prompt(self):
        """The texts up to the place where the assistant begins to write."""
        *texts, lead, _, _ = self.texts
        return [*texts, lead[: self.begin - sum(map(len, texts))]]


# ---- templates


class Clock:
    """A clock that stands at midnight of a date, and knows whether it was read."""

    def __init__(self, date):
        self.time, self.read = datetime.datetime.fromisoformat(date), False

    def now(self):
        self.read = True
        return self.time


class Chat:
    """How a tokenizer writes a conversation.

    plain: without its template; the two texts, a line break between them, and an end token. date:
    what a template that writes the day is told, as 2024-07-26. ValueError if the tokenizer can't
    say which characters its tokens hold, or has no template.

    start: the token before a text that is encoded alone. end: the trained token that closes the
    assistant's turn. stop_tokens: where generation stops. control: the pattern of control tokens in
    a text. header: what the assistant writes before its text. prompt_differs: whether the
    template's generation prompt is not what precedes the assistant's turn in a conversation.
    """

    def __init__(self, tokenizer, plain=False, date=DATE):
        check_tokenizer(tokenizer, plain)
        self.tokenizer, self.plain = tokenizer, plain
        self.forms, self.parts, self.clock = {}, False, Clock(date)
        eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.start = eos if bos is None else bos
        self.before_all = [self.start] if plain else []  # a template writes its own
        if not self.takes("user", "assistant"):
            self.parts = True  # some templates take nothing but lists of parts
            self.parts = self.takes("user", "assistant")
        own, opening = self.form(("user", "assistant"))
        self.header = own[-2][opening:]
        self.closing = self.form(("user",)).own[-1]  # of the user's turn
        self.takes_system = self.takes("system", "user", "assistant")
        controls = control_tokens(tokenizer, own)
        self.special = set(controls.values())
        self.spellings = private_spellings(controls)
        self.control = re.compile("|".join(map(re.escape, sorted(controls, key=len)[::-1])))
        self.core = respell(tokenizer.backend_tokenizer, self.spellings)
        turns = self.conversation(None, "u", "a")
        self.end = turns.tokens[turns.labels[-1]]
        self.stop_tokens = sorted({self.end, eos})
        asked = self.render(("user",), ["u"], add_generation_prompt=True)
        self.prompt_differs = asked != "".join(self.write(self.messages(None, "u", "a")).prompt())

    def render(self, roles, texts, **options):
        """What the template makes of these messages, as text; ValueError if it refuses them."""
        if self.parts:
            texts = [[{"type": "text", "text": text}] for text in texts]
        messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        template = PLAIN if self.plain else None
        try:
            # Templates ask transformers for the day.
            with mock.patch.object(chat_template_utils, "datetime", self.clock):
                return self.tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, **options
                )
        except (TemplateError, TypeError) as e:
            raise ValueError(
                f"the chat template refuses messages of {' and '.join(roles)} ({e}); "
                "choose dataset.plain: true" + ", or dataset.views: prefix" * (len(roles) == 1)
            ) from None

    def form(self, roles):
        """The Form of messages of these roles; ValueError if the template has none for them."""
        if roles not in self.forms:
            self.forms[roles] = self.make_form(roles)
        return self.forms[roles]

    def make_form(self, roles):
        marks = [PLACEHOLDER.format(n) for n in range(len(roles))]
        parts = PLACEHOLDERS.split(self.render(roles, marks))
        own, order = parts[::2], parts[1::2]
        if order != [str(n) for n in range(len(roles))]:
            raise ValueError(
                "the chat template doesn't write every message once and in order; "
                "choose dataset.plain: true"
            )
        if roles[-1] != "assistant":
            return Form(own)
        if len(roles) == 1:
            return Form(own, len(own[0]))
        asked, unasked = (
            self.render(roles[:-1], marks[:-1], add_generation_prompt=given)
            for given in (True, False)
        )
        opening = PLACEHOLDERS.split(asked)[-1]
        header = own[-2].removeprefix(opening)  # what the prompt leaves to the assistant
        if not own[-2].startswith(opening) or (asked == unasked and header.strip()):
            opening = own[-2]  # the template has no generation prompt, or another one
        return Form(own, len(opening))

    def takes(self, *roles):
        """Whether the template writes messages of these roles."""
        try:
            self.form(roles)
        except ValueError:
            return False
        return True

    def write(self, messages):
        """(role, text) messages, as Written.

        A template may strip texts, and may rewrite how the assistant's thinking is set apart.
        ValueError if it changes more.
        """
        roles, texts = zip(*messages, strict=True)
        own, opening = self.form(roles)
        whole = self.render(roles, texts)
        answer = texts[-1] if roles[-1] == "assistant" else None
        asked = texts if answer is None else texts[:-1]
        ways = [interleave(own, way) for way in itertools.product(*map(stripped, asked))]
        *texts, lead = max(ways, key=lambda way: len(os.path.commonprefix(["".join(way), whole])))
        before = "".join(texts)
        if answer is None and before + lead == whole:
            return Written([*texts, lead])
        lead = os.path.commonprefix([lead, whole[len(before) :]])
        said = whole[len(before + lead) :].removesuffix(own[-1])
        if answer is not None and before + lead + said + own[-1] == whole and holds(said, answer):
            begin = len(before) + min(opening, len(lead))
            return Written([*texts, lead, said, own[-1]], begin)
        if answer is not None and "</think>" in answer:
            raise ValueError(
                "the chat template drops the assistant's <think> passage; "
                "choose dataset.remove_thinking: true or dataset.plain: true"
            )
        raise ValueError(
            "the chat template rewrites a message's text, so its place is not known; "
            "choose dataset.plain: true"
        )

    # ---- tokens

    def encode(self, text):
        """The tokens of a message's text, without any special ones around it."""
        return self.core.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts):
        """Texts as in Written, as (tokens, which characters each one holds)."""
        spelled = [
            text if n % 2 else self.control.sub(lambda found: self.spellings[found[0]], text)
            for n, text in enumerate(texts)
        ]
        whole = "".join(spelled)
        encoding = self.core.encode(whole, add_special_tokens=False)
        tokens, offsets = list(self.before_all), [(0, 0)] * len(self.before_all)
        for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self.special:  # some take in the whitespace beside them
                start = stop - len(whole[start:stop].lstrip())
                stop = start + len(whole[start:stop].rstrip())
            tokens.append(token)
            offsets.append((start, stop))
        return tokens, offsets

    def turns(self, messages):
        """The Turns of (role, text) messages. One of the assistant ends with the end token.

        A single message makes a conversation of its own, as LLM-JEPA encodes a view.
        """
        written, roles = self.write(messages), [role for role, _ in messages]
        tokens, offsets = self.encode_all(written.texts)
        turns = Turns(tokens, offsets, range(0), [])
        if "user" in roles:
            n = 2 * roles.index("user") + 1
            start, stop = written.place(n)
            user = turns.holding(start, stop)
            closing = os.path.commonprefix([self.closing, written.texts[n + 1]])
            tail = turns.holding(stop, stop + len(closing))
            # The text's last token may also hold the beginning of the tail.
            turns = turns._replace(user=user, user_tail=tokens[user.stop : tail.stop])
        if roles[-1] != "assistant":
            return turns
        start, stop = written.place(len(written.texts) - 2)
        said = turns.holding(start, stop)
        end = next((n for n in range(said.stop, len(tokens)) if tokens[n] in self.special), None)
        if end is None:  # the template writes none
            end = said.stop
            tokens[end:], offsets[end:] = [self.tokenizer.eos_token_id], [(stop, stop)]
        return turns._replace(
            assistant=said,
            assistant_tail=tokens[said.stop :],
            labels=range(turns.holding(written.begin, stop)[0], end + 1),
            said=written.texts[-2],
            said_at=start,
        )

    def messages(self, system, user, assistant):
        """A conversation as (role, text) messages.

        If the template takes no system message, its text stands at the beginning of the user's.
        """
        if system and not self.takes_system:
            system, user = None, f"{system}\n\n{user}"
        turns = [("system", system)] if system else []
        return [*turns, ("user", user), ("assistant", assistant)]

    def conversation(self, system, user, assistant):
        """The Turns of a whole conversation."""
        return self.turns(self.messages(system, user, assistant))

    def prompt(self, system, user):
        """The tokens from which the assistant's turn is generated."""
        return self.encode_all(self.write(self.messages(system, user, "a")).prompt())[0]

    def before_text(self, system, user):
        """The tokens before those of the assistant's text, which may begin after a header."""
        turns = self.conversation(system, user, "A")
        return turns.tokens[: turns.assistant[0]]


def stripped(text):
    """The text, and what is left of it without the whitespace at its ends."""
    return dict.fromkeys([text, text.strip(), text.lstrip(), text.rstrip()])


def interleave(own, texts):
    """The template's own texts, and the messages' between them: [own, text, own, .., own]."""
    pairs = zip(own, texts, strict=False)
    return [*itertools.chain.from_iterable(pairs), own[len(texts)]]


def holds(said, text):
    """Whether the text stands in what a template wrote, but for whitespace and thinking tags."""
    return all(
        "".join(piece.split()) in "".join(said.split()) for piece in re.split("</?think>", text)
    )


# ---- tokenizers


def decode(tokenizer, tokens):
    """The text of tokens as it is, special ones too; cleaning up would rewrite " ." as "."."""
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check_tokenizer(tokenizer, plain):
    """ValueError if a Chat can't be made with this tokenizer."""
    name = tokenizer.name_or_path
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer {name} is a slow one, which doesn't tell where its tokens stand; "
            "use a model with a fast tokenizer"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {name} has no end token; set its eos_token")
    if not plain and not tokenizer.chat_template:
        raise ValueError(f"the tokenizer {name} has no chat template; choose dataset.plain: true")


def control_tokens(tokenizer, own):
    """{control token: its id}: special tokens, and added ones in the template's own texts."""
    special, added = tokenizer.all_special_ids, tokenizer.added_tokens_decoder
    controls = {}
    for n, token in added.items():
        is_text = token.content in THINKING or token.content.isspace()
        written = any(token.content in text for text in own)
        if token.special or n in special or (written and not is_text):
            controls[token.content] = n
    return controls


def private_spellings(names):
    """{name: as many private-use characters}, which differ, and which no text can foresee."""
    draw = random.SystemRandom()
    return {
        name: chr(PRIVATE[n]) + "".join(map(chr, draw.choices(PRIVATE, k=len(name) - 1)))
        for n, name in enumerate(names)
    }


def respell(core, spellings):
    """A copy of a tokenizers.Tokenizer in which tokens are spelled otherwise; ids stay."""
    state = json.loads(core.to_str())
    model = state["model"]
    # This would trim the characters that a token holds.
    state["post_processor"] = state["truncation"] = state["padding"] = None
    for token in state["added_tokens"]:
        token["content"] = spellings.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {spellings.get(k, k): n for k, n in model["vocab"].items()}
    else:  # of a unigram model: (piece, score)
        model["vocab"] = [[spellings.get(k, k), score] for k, score in model["vocab"]]
    if model.get("unk_token") in spellings:
        model["unk_token"] = spellings[model["unk_token"]]
    if "merges" in model:  # no text is merged into a control token, or out of one
        model["merges"] = [pair for pair in model["merges"] if not parts_of(pair) & set(spellings)]
    return Tokenizer.from_str(json.dumps(state))


def parts_of(pair):
    """The tokens of a merge of BPE, "a b" or ["a", "b"]: both, and what they make."""
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return {left, right, left + right}
