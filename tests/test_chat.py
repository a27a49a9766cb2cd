"""Conversations as tokens: where texts stand, whatever the tokenizer and the template do."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hf
from nanojepa.hf.chat import Chat
from nanojepa.texts import remove_thinking

TAGS = ["think>", "</think>", "<Thought>", "</Thought>", "<Output>", "</Output>", "<Answer>"]


@pytest.fixture(scope="module")
def chats():
    """{(kind, plain): Chat}."""
    tokenizers = {kind: hf.make_tokenizer(kind) for kind in hf.KINDS}
    return {
        (kind, plain): Chat(tokenizer, plain)
        for kind, tokenizer in tokenizers.items()
        for plain in (False, True)
    }


WORDS = st.text(
    st.characters(codec="utf-8", exclude_characters="\ue000\ue001<|>"), min_size=1, max_size=12
).filter(str.strip)


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_places_are_those_of_the_texts(chats, data):
    """The assistant's text may stand in the prompt too, so it can't be searched for."""
    kind, plain = data.draw(st.sampled_from(sorted(chats)))
    system, user, assistant = data.draw(st.none() | WORDS), data.draw(WORDS), data.draw(WORDS)
    if data.draw(st.booleans()):
        user = f"{user} {assistant}"
    chat = chats[kind, plain]
    turns = chat.conversation(system, user, assistant)
    decode = chat.tokenizer.decode
    # Llama's template strips texts.
    said = assistant.strip() if kind == "llama" and not plain else assistant
    assert turns.said == said
    answer = [turns.tokens[n] for n in turns.labels]
    # NeoX's template writes a blank, which a token may share with the text.
    blank = " " * (kind == "neox" and not plain)
    assert decode([turns.tokens[n] for n in turns.assistant]) in (said, blank + said)
    assert decode(answer) == blank + said + chat.tokenizer.eos_token and answer[-1] == chat.end
    short = chat.conversation(system, user, "a")
    assert short.tokens[: short.labels.start] == chat.prompt(system, user)
    before = decode(turns.tokens[: turns.user[-1] + 1])
    assert before.rstrip().endswith(user.rstrip()) or before.endswith(user.strip())
    if system and (kind != "llama" or plain):
        assert system in before
    lone = chat.turns([("user", user)])
    assert decode([lone.tokens[n] for n in lone.user]).strip() == user.strip()


def test_a_token_may_span_the_end_of_the_text():
    """A plain-text template, whose line break merges with a question mark."""
    tokenizer = hf.make_tokenizer("neox", texts=["?\n"] * 9, vocab_size=260, split=False)
    turns = Chat(tokenizer).conversation(None, "Why?", "so")
    assert tokenizer.decode(turns.tokens[turns.user[-1]]) == "?\n"
    assert tokenizer.decode(turns.user_tail) == "Answer:"


def test_the_end_of_the_turn_need_not_be_the_tokenizer_s_end_token():
    """As in base models with a chat template: the turn's own end token is trained, both stop."""
    chat = Chat(hf.make_tokenizer("qwen", eos_token="<|endoftext|>"))
    end = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    turns = chat.conversation(None, "a", "b")
    assert turns.tokens[turns.labels[-1]] == chat.end == end
    assert chat.stop_tokens == sorted([end, chat.tokenizer.eos_token_id])


def test_plain_texts_need_no_template():
    """The conversation and each text alone; a system message is a line before the user's."""
    tokenizer = hf.make_tokenizer("llama")
    tokenizer.chat_template = None
    chat = Chat(tokenizer, plain=True)
    start, end = chat.start, tokenizer.eos_token_id
    turns = chat.conversation("Be brief.", "Why?", "so")
    assert turns.tokens == [start, *chat.encode("Be brief.\nWhy?\n"), *chat.encode("so"), end]
    assert tokenizer.decode([turns.tokens[n] for n in turns.user]) == "Why?"
    assert chat.turns([("user", "Why?")]).tokens == [start, *chat.encode("Why?\n")]
    assert chat.turns([("assistant", "so")]).tokens == [start, *chat.encode("so"), end]


def test_the_assistant_writes_all_that_follows_the_generation_prompt(chats):
    """NeoX's prompt ends in "Answer:", so the blank before the text is generated too."""
    decode = chats["neox", False].tokenizer.decode
    assert decode(chats["neox", False].prompt(None, "Why?")) == "Question: Why?\nAnswer:"
    assert not any(chat.prompt_differs for chat in chats.values())
    without = hf.make_tokenizer("qwen")
    without.chat_template = hf.TEMPLATES["qwen"].split("{% if add")[0]
    other = hf.make_tokenizer("qwen")
    other.chat_template = hf.TEMPLATES["qwen"].replace("assistant\n{% endif", "bot\n{% endif")
    for tokenizer in (without, other):
        chat = Chat(tokenizer)
        assert chat.prompt_differs
        assert tokenizer.decode(chat.prompt(None, "Why?")).endswith("<|im_start|>assistant\n")


def test_templates_that_rewrite_are_refused():
    tokenizer = hf.make_tokenizer("qwen")
    for template, message in [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "rewrites a message's text"),
        ("{{ messages[-1].content }}", "doesn't write every message once and in order"),
        (None, "no chat template; choose dataset.plain"),
    ]:
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=message):
            Chat(tokenizer)
    only_pairs = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = only_pairs + hf.TEMPLATES["qwen"]
    with pytest.raises(ValueError, match="refuses messages of assistant .*dataset.views: prefix"):
        Chat(tokenizer).turns([("assistant", "yes")])


# ---- thinking


def test_thinking_is_removed():
    text = "<think>a\nb</think> yes <Output>4</Output><Thought>x</Thought>"
    assert remove_thinking(text) == "yes 4"
    assert remove_thinking("a < b and <i>c</i>") == "a < b and <i>c</i>"


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(["<", "</", "\n", "a ", "<think>", *TAGS]), max_size=12))
def test_thinking_is_what_the_patterns_match(pieces):
    text = "".join(pieces)
    expected = text
    for pattern in ("<think>.*?</think>", "<Thought>.*?</Thought>", "</?(Output|Answer)>"):
        expected = re.sub(pattern, "", expected, flags=re.DOTALL)
    assert remove_thinking(text) == expected.strip()


@pytest.mark.parametrize(
    "piece", ["<think>", "<Thought><think>", "<think></Thought>", "<think>x</think>", "</Answer>"]
)
def test_thinking_of_a_hostile_text_is_removed_in_time(piece):
    """A megabyte: a pattern that searches after every tag takes minutes."""
    began = time.perf_counter()
    remove_thinking(piece * (1_000_000 // len(piece)))
    assert time.perf_counter() - began < 2
