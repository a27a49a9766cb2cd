"""Rules on texts that are neither data nor models: thinking, and the words of an answer."""

import re
import string
import unicodedata

ARTICLES = ("a", "an", "the")
# Private-use characters that stand for a point and a sign inside a number.
POINT, MINUS = "\ue000", "\ue001"
# A number without a leading zero, that is no part of a word, a date or a range.
NUMBER = re.compile(
    r"(?<![\w.,\-])(-?)((?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d*|0)(?:\.\d+)?|\.\d+)(?!\w|[.,]\d)"
)
# Blanks that group digits: no-break, narrow no-break, thin.
GROUPING = re.compile("(?<=\\d)[\u00a0\u202f\u2009](?=\\d{3}(?!\\d))")


def remove_thinking(text):
    """The text without <think> and <Thought> passages, and without <Output> and <Answer> tags."""
    for name in ("think", "Thought"):
        # Up to the last closing tag every opening one has its end, so the time is linear.
        begin, close, rest = text.rpartition(f"</{name}>")
        text = re.sub(f"<{name}>.*?</{name}>", "", begin + close, flags=re.DOTALL) + rest
    return re.sub("</?(Output|Answer)>", "", text).strip()


# ---- answers; docs/evaluation.md has each rule's source


def normalise(text):
    """The words of a text without articles."""
    return [word for word in plain_words(text) if word not in ARTICLES]


def plain_words(text):
    """The words of a text: no capitals, no punctuation, one form of each character and number."""
    text = unicodedata.normalize("NFKC", GROUPING.sub("", text)).replace("\u2212", "-")
    text = NUMBER.sub(plain_number, text.casefold())
    return "".join(c for c in text if not is_punctuation(c)).split()


def plain_number(found):
    """1,000.50 as 1000.5, whose point and sign outlive the punctuation."""
    sign, digits = found.groups()
    whole, _, part = digits.replace(",", "").partition(".")
    part = part.rstrip("0")
    number = (whole or "0") + (POINT + part if part else "")
    return (MINUS if sign and number != "0" else "") + number


def is_punctuation(character):
    return character in string.punctuation or unicodedata.category(character).startswith("P")
