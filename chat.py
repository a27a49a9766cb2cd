"""Messages as tokens, with the place of every message's content: through a tokenizer's chat template, or plain.

Places come from the template's text, never from searching for tokens: each content is rendered as a placeholder, so its
characters are known, and a fast tokenizer gives every token's characters. What the assistant says is tokenised apart from
its prompt, as generation from prompt() does. One system message at most, one user and one assistant message.
"""
import itertools
import re
from dataclasses import dataclass

from jinja2 import TemplateError

PLACEHOLDER, PLACEHOLDERS = "\ue000%d\ue001", re.compile("\ue000(\\d+)\ue001")  # private-use characters: no template trims or splits them
TAG = re.compile("<(think|Thought)>|</?(?:Output|Answer)>")


def remove_thinking(text):
    """The text without <think> and <Thought> passages, and without bare <Output> and <Answer> tags."""
    kept, start, at, unclosed = [], 0, 0, set()  # a tag that nothing closes is looked for once, so that time grows as the text
    while tag := TAG.search(text, at):
        at = tag.end()
        if name := tag[1]:
            end = -1 if name in unclosed else text.find(f"</{name}>", at)
            if end < 0:
                unclosed.add(name)
                continue
            at = end + len(f"</{name}>")
        kept.append(text[start:tag.start()])
        start = at
    return ("".join(kept) + text[start:]).strip()


@dataclass
class Turns:
    """tokens, and of each content its range of tokens: `user` and `assistant`, None where there is no such message.

    user_tail, assistant_tail: the template's tokens that close the turn. said: the assistant's text as the template writes it.
    """
    tokens: list
    user: range | None
    assistant: range | None
    user_tail: list
    assistant_tail: list
    said: str = ""


class Chat:
    """A tokenizer's way of writing a conversation. plain: no template; the texts, a line break between them, and an end token.

    start: the token that a view encoded alone begins with; end: the one that closes the assistant's turn and is trained.
    prompt_differs: the template's generation prompt is not the text before an assistant's content, which prompt() is.
    ValueError where the tokenizer can't say where its tokens come from, or has no template.
    """

    def __init__(self, tokenizer, plain=False):
        self.tokenizer, self.plain = tokenizer, plain
        if not tokenizer.is_fast:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path} is a slow one, which doesn't tell where its tokens stand; use a model with a fast tokenizer")
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no end token; set its eos_token")
        if not plain and not tokenizer.chat_template:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no chat template; choose dataset.plain: true")
        self.start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.special = {*tokenizer.all_special_ids, *(n for n, token in tokenizer.added_tokens_decoder.items() if token.special)}
        self.line_break = self.encode("\n")
        self.takes_system = not plain and self.renders([("system", "s"), ("user", "u"), ("assistant", "a")])
        self.end = self.conversation(None, "u", "a").assistant_tail[-1]
        self.prompt_differs = not plain and self.prompt(None, "u") != self.encode(
            tokenizer.apply_chat_template([{"role": "user", "content": "u"}], add_generation_prompt=True, tokenize=False))
        self.stop_tokens = sorted({self.end, tokenizer.eos_token_id})

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode_places(self, text, spans):
        """(tokens of a text, the range of tokens that hold each (start, stop) of its characters)."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = found["offset_mapping"]
        held = [[n for n, (a, b) in enumerate(offsets) if a < stop and b > start] for start, stop in spans]
        return found["input_ids"], [range(h[0], h[-1] + 1) if h else range(0) for h in held]

    def renders(self, messages):
        try:
            self.pieces(messages)
        except ValueError:
            return False
        return True

    def pieces(self, messages):
        """The template's texts before, between and behind the contents of (role, content) messages, and the contents as the
        template writes them, whitespace at their ends stripped or not."""
        apply = lambda contents: self.tokenizer.apply_chat_template(
            [{"role": role, "content": text} for (role, _), text in zip(messages, contents)], tokenize=False)
        contents = [text for _, text in messages]
        try:
            parts = PLACEHOLDERS.split(apply([PLACEHOLDER % i for i in range(len(messages))]))
        except TemplateError as e:
            raise ValueError(f"the chat template refuses messages of {' and '.join(role for role, _ in messages)} ({e}); choose dataset.plain: true"
                             + (", or dataset.views: prefix" if len(messages) == 1 else "")) from None
        if [int(i) for i in parts[1::2]] != list(range(len(messages))):
            raise ValueError("the chat template doesn't write every message once and in order; choose dataset.plain: true")
        whole = apply(contents)
        for texts in itertools.product(*((text, text.strip()) for text in contents)):
            if "".join(a + b for a, b in zip(parts[::2], texts + ("",))) == whole:
                return parts[::2], texts
        raise ValueError("the chat template rewrites a message's text, so its place is not known; choose dataset.plain: true")

    def with_system(self, system, user):
        """(role, content) messages; the system message stands in the user's where the template refuses it."""
        if not system or self.takes_system:
            return ([("system", system)] if system else []) + [("user", user)]
        return [("user", f"{system}\n{user}" if self.plain else f"{system}\n\n{user}")]

    def prompt(self, system, user):
        """The tokens from which the assistant's content is generated."""
        turns = self.conversation(system, user, "a")
        return turns.tokens[:turns.assistant[0]]

    def conversation(self, system, user, assistant):
        """The Turns of a whole conversation; it ends with the end token."""
        messages = self.with_system(system, user)
        if self.plain:
            user_tokens, answer = self.encode(messages[0][1]), self.encode(assistant)
            before = [self.start, *user_tokens, *self.line_break]
            return Turns([*before, *answer, self.tokenizer.eos_token_id], range(1, 1 + len(user_tokens)),
                         range(len(before), len(before) + len(answer)), self.line_break, [self.tokenizer.eos_token_id], assistant)
        between, texts = self.pieces([*messages, ("assistant", assistant)])
        begin = sum(map(len, (*between[:-2], *texts[:-2])))
        stop = begin + len(texts[-2])
        before = "".join(a + b for a, b in zip(between[:-2], texts)) + between[-2]
        closing = self.pieces(messages)[0][-1]  # what the template writes behind a user's text that is the last
        prompt, (user_place, tail) = self.encode_places(before, [(begin, stop), (stop, stop + len(closing) if between[-2].startswith(closing) else len(before))])
        tail = prompt[user_place.stop:tail.stop]  # a token may hold the end of the text and the beginning of what follows
        answer, ending = self.encode(texts[-1]), self.ending(between[-1])
        first = len(prompt)
        return Turns([*prompt, *answer, *ending], user_place, range(first, first + len(answer)), tail, ending, texts[-1])

    def ending(self, text):
        """The tokens that close the assistant's turn, up to the first special one, which is then the last; without one, the end token."""
        tokens = self.encode(text)
        special = [n for n, token in enumerate(tokens) if token in self.special]
        return tokens[:special[0] + 1] if special else [self.tokenizer.eos_token_id]

    def alone(self, role, text):
        """The Turns of one message through the template by itself, as the reference implementation encodes a view."""
        if self.plain:
            tokens = [self.start, *self.encode(text)]
            place, tail = range(1, len(tokens)), self.line_break if role == "user" else [self.tokenizer.eos_token_id]
        else:
            between, (text,) = self.pieces([(role, text)])
            tokens, (place,) = self.encode_places(between[0] + text, [(len(between[0]), len(between[0]) + len(text))])
            tail = self.encode(between[1])
        return Turns(tokens + tail, *((place, None, tail, []) if role == "user" else (None, place, [], tail)))
