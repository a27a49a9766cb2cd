"""Records as examples: what is encoded of them, what is trained, and what is compared."""

import functools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hf
from nanojepa.hf import layout
from nanojepa.hf.chat import Chat
from nanojepa.hf.layout import Source, lay_out, prepare, read_records, read_sources
from nanojepa.hf.settings import Data
from nanojepa.objectives import OBJECTIVES, Options
from nanojepa.records import Record, read_examples

PREDS = (400, 401)
WORDS = st.text("ab c\n", min_size=1, max_size=12).filter(str.strip)


@pytest.fixture(scope="module")
def chats():
    return {kind: Chat(hf.make_tokenizer(kind)) for kind in hf.KINDS}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "questions.jsonl"
    return hf.write_messages(file, hf.QUESTIONS[:8])


def build_objective(name="pair", **options):
    return OBJECTIVES[name](Options(width=32, normed=False, **options))


def pair(user, assistant, system=None):
    return Record(1, "pairs", system, [user, assistant])


def seen(example, place):
    """The tokens that the state at a place has seen."""
    number, token = place
    document = example.documents[number]
    path = document.trunk
    if document.branch:
        path = [*document.trunk[: document.fork + 1], *document.branch]
    return path[: token + 1]


def views(example):
    """What the two states of an example's only pair have seen."""
    ((a, b),) = example.pairs
    return seen(example, a), seen(example, b)


@given(st.sampled_from(hf.KINDS), st.booleans(), WORDS, WORDS)
@settings(max_examples=60, deadline=None)
def test_labels_are_the_assistant_s_text_and_its_end_token(chats, kind, plain, user, assistant):
    """The answer stands in the prompt too: its tokens are not searched for."""
    chat = Chat(chats[kind].tokenizer, plain)
    data = Data(plain=plain)
    (document,) = lay_out(pair(f"{user} {assistant}", assistant), chat, data).documents
    labels = chat.tokenizer.decode([document.trunk[i] for i in document.loss_on])
    said = assistant.strip() + chat.tokenizer.eos_token  # remove_thinking strips it
    assert labels == (f" {said}" if kind == "neox" and not plain else said)  # of its template
    data.train_all = True
    (document,) = lay_out(pair(user, assistant), chat, data).documents
    assert document.loss_on == range(1, len(document.trunk))


@pytest.mark.parametrize("kind", hf.KINDS)
def test_views_are_conversations_of_their_own(chats, kind):
    """With and without a system message, which only view A of views: prefix has seen."""
    chat, record = chats[kind], pair("What is it?", "An egg.", "Be brief.")
    for system in (None, "Be brief."):
        record = pair("What is it?", "An egg.", system)
        example = lay_out(record, chat, Data(), build_objective(preds=PREDS))
        a, b = views(example)
        lone = [chat.turns([turn]) for turn in (("user", "What is it?"), ("assistant", "An egg."))]
        assert a == [*lone[0].tokens[: lone[0].user.stop], *PREDS]
        assert b == lone[1].tokens[: lone[1].assistant.stop]
        # If the conversation begins with view A, it is encoded once.
        assert len(example.documents) == (3 if system else 2)
        prefix = lay_out(record, chat, Data(views="prefix"), build_objective(preds=PREDS))
        turns = chat.conversation(system, "What is it?", "An egg.")
        answer = [turns.tokens[n] for n in turns.assistant]
        assert views(prefix) == (
            [*turns.tokens[: turns.user.stop], *PREDS],
            [chat.start, *answer],
        )
        assert len(prefix.documents) == 2


def test_front_and_reversed_views(chats):
    chat, record = chats["qwen"], pair("What is it?", "An egg.")
    data = Data(views="prefix")
    a, b = views(lay_out(record, chat, data, build_objective(preds=PREDS, reverse=True)))
    assert chat.tokenizer.decode(a[1:-2]) == "An egg." and a[-2:] == list(PREDS)
    assert chat.tokenizer.decode(b).endswith("What is it?")
    a, _ = views(lay_out(record, chat, data, build_objective(preds=PREDS, front=True)))
    begin = a.index(PREDS[0])
    assert a[begin : begin + 2] == list(PREDS)
    assert chat.tokenizer.decode(a[begin + 2 :]) == "What is it?"


def test_last_token_counts_from_the_end_of_the_turn(chats):
    """Llama's turn ends in <|eot_id|>: -1 is that one, -2 the last token of text, the default."""
    chat, record = chats["llama"], pair("What is it?", "An egg.")
    end = chat.tokenizer.eos_token_id

    def states(last_token, name="pair", answer="An egg."):
        chosen = build_objective(name, preds=PREDS, last_token=last_token)
        return views(lay_out(pair("What is it?", answer), chat, Data(), chosen))

    assert states(-2) == states(0)
    assert states(-1) == tuple([*view, end] for view in states(0))
    # Qwen's ends in <|im_end|> and a line break, whichever way the views are written.
    chosen, default = (build_objective(last_token=n) for n in (-3, 0))
    for ways in ("standalone", "prefix"):
        lay = functools.partial(lay_out, record, chats["qwen"], Data(views=ways))
        assert views(lay(chosen)) == views(lay(default))
    # A step closes no turn.
    assert states(-2, "step", "One.\n\nTwo.") == states(0, "step", "One.\n\nTwo.")
    source = Source("file", [record])
    with pytest.raises(ValueError, match="file, line 1: training.last_token=-400: a view has"):
        prepare(source, chat, Data(), build_objective(last_token=-400))


@pytest.mark.parametrize(
    "text, steps",
    [
        ("a b.\n\nc d.\n\n#### 3", ("a b.\n\n", "c d.\n\n")),
        ("a\n \n\nb", ("a\n \n\n", "b")),
        ("x\n\ny", ("x\n\n", "y")),
        ("one step\nof two lines", None),
    ],
)
def test_steps_are_found_in_the_text_and_keep_their_blank_line(chats, text, steps):
    """Blank lines of other messages, and of the template, are no ends of steps."""
    chat = chats["qwen"]
    record = pair("a\n\nquestion", text, "A\n\nsystem")
    example = lay_out(record, chat, Data(), build_objective("step", preds=PREDS))
    if steps is None:
        assert not example.pairs and example.no_term == "fewer than two steps"
        return
    a, b = views(example)
    turns = chat.conversation("A\n\nsystem", "a\n\nquestion", text)
    assert a[: turns.assistant[0]] == turns.tokens[: turns.assistant[0]]
    found = chat.tokenizer.decode(a[turns.assistant[0] : -2]), chat.tokenizer.decode(b[1:])
    assert found == steps and a[-2:] == list(PREDS) and b[0] == chat.start


def test_spans_lie_between_the_first_token_of_the_user_and_the_last_of_the_assistant(chats):
    for kind, chat in chats.items():
        example = lay_out(
            pair("What?", "An egg.", "Be brief."), chat, Data(), build_objective("span")
        )
        turns = chat.conversation("Be brief.", "What?", "An egg.")
        assert example.pairs == [((0, turns.user[0]), (0, turns.assistant[-1]))], kind


def test_long_examples_are_cut_and_counted(chats):
    long = "word " * 60
    records = [pair("short", "short"), pair("short", long), pair(long, "short")]
    found = prepare(Source("file", records), chats["llama"], Data(max_length=48), build_objective())
    assert len(found.examples) == 2
    assert max(len(d.trunk) for e in found.examples for d in e.documents) <= 48
    assert found.summary.startswith("file: 2 examples, ")
    for part in (
        "1 cut to max_length",
        "1 dropped: no label left by max_length",
        "1 without a JEPA term: a view is cut off by max_length",
    ):
        assert f"; {part}" in found.summary
    with pytest.raises(ValueError, match="no example has a label left; raise dataset.max_length=8"):
        prepare(Source("file", records), chats["llama"], Data(max_length=8))


def test_paraphrases_each_predict_the_next(chats, tmp_path):
    file = tmp_path / "groups.jsonl"
    groups = [["a b", "c d e", "f"], ["x", "y"]]
    file.write_text("\n".join(json.dumps({"paraphrases": texts}) for texts in groups))
    data = Data(plain=True, train_all=True)
    chat = Chat(chats["llama"].tokenizer, plain=True)
    records = read_records(str(file), data, 0)
    first, _ = prepare(Source("file", records), chat, data, build_objective(preds=PREDS)).examples
    texts = [[chat.start, *chat.encode(text)] for text in groups[0]]
    assert [(seen(first, a), seen(first, b)) for a, b in first.pairs] == [
        ([*texts[0], *PREDS], texts[1]),
        ([*texts[1], *PREDS], texts[2]),
    ]
    assert len(first.documents) == 3
    assert all(d.loss_on == range(1, len(d.trunk)) for d in first.documents)
    with pytest.raises(
        ValueError, match="paraphrases have no user .*give dataset.plain and train_all"
    ):
        read_records(str(file), Data(), 0)


def test_a_record_that_cannot_be_laid_out_is_named(chats):
    records = [pair("q", "yes"), Record(7, "pairs", None, ["q", "<think>hm</think>"])]
    with pytest.raises(ValueError, match="^file, line 7: remove_thinking leaves nothing"):
        prepare(Source("file", records), chats["qwen"], Data())
    whole = prepare(Source("file", records), chats["qwen"], Data(remove_thinking=False))
    assert len(whole.examples) == 2


def test_several_processes_make_the_same_examples(chats, questions):
    source = Source(questions, read_examples(questions))
    one = prepare(source, chats["neox"], Data(), build_objective())
    two = prepare(
        source, chats["neox"], Data(tokenize_num_proc=2, tokenize_batch_size=3), build_objective()
    )
    assert one == two


# ---- sources


def test_a_file_is_split_by_its_seed(questions):
    def split(**settings):
        sources = read_sources(Data(data_file=questions, eval_split=0.25, **settings))
        return [[record.line for record in sources[name].records] for name in ("train", "eval")]

    train, evaluated = split()
    assert sorted(train + evaluated) == list(range(1, 9)) and len(evaluated) == 2
    assert split(split_seed=5) != split() == split()
    assert split(max_items=3, max_eval_items=1) == [train[:3], evaluated[:1]]


def test_keys_of_loading_reach_the_loader(questions, monkeypatch):
    calls = []

    def open_dataset(name, config_name, split, order, cache_dir, key):
        calls.append((name, config_name, split, order[0], cache_dir, key))
        return [json.loads(line) for line in Path(questions).read_text().splitlines()]

    monkeypatch.setattr(layout, "open_dataset", open_dataset)
    names = dict(train_file="owner/name", eval_file="owner/name")
    options = dict(config_name="main", train_split="part", test_split="rest", cache_dir="dc")
    first = read_sources(Data(**names, **options, max_items=5, max_eval_items=2))
    read_sources(Data(**names))
    assert [len(source.records) for source in first.values()] == [5, 2]
    train, test = "dataset.train_split", "dataset.test_split"
    assert calls == [
        ("owner/name", "main", "part", "train", "dc", train),
        ("owner/name", "main", "rest", "test", "dc", test),
        ("owner/name", "", "", "train", "", train),
        ("owner/name", "", "", "test", "", test),
    ]


def test_only_the_lines_that_are_asked_for_are_read(questions, tmp_path):
    file = tmp_path / "late.jsonl"
    file.write_text(Path(questions).read_text() + "no JSON")
    assert len(read_records(str(file), Data(), 3)) == 3
    with pytest.raises(ValueError, match="late.jsonl, line 9"):
        read_records(str(file), Data(), 0)
