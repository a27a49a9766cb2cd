"""--show: what is trained and compared, as training has it, without a model's weights."""

import json
import sys
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.utils import chat_template_utils

import families
import hf
import train_gpt
from conftest import CPU
from nanojepa.hf import run, settings
from nanojepa.hf.chat import DATE, Clock
from nanojepa.packing import Document, Example, pack_rows
from nanojepa.settings import load_settings
from nanojepa.show import Spelling, paint, parts_of, printable, show

KEYS = ["text", "tokens", "ids", "trained", "positions", "branches", "compared"]
SPELLING = Spelling(lambda ids: [f"<{n}>" for n in ids], lambda ids: "".join(f"<{n}>" for n in ids))


def shown(capsys, *flags):
    """(JSON lines of the examples, the counts) that --show prints."""
    run.main([*map(str, flags)])
    *examples, counts = map(json.loads, capsys.readouterr().out.splitlines())
    return examples, counts


def make_folder(path, tokenizer):
    """A model's folder without weights."""
    shape = dict(num_hidden_layers=1, hidden_size=8, num_attention_heads=1)
    LlamaConfig(vocab_size=len(tokenizer), **shape).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


# ---- fine-tuning


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_ids_are_those_of_the_chat_template(name, tmp_path, capsys):
    tokenizer = families.make_tokenizer(name)
    folder = make_folder(tmp_path / "model", tokenizer)
    said = [(None, "What is 2 + 2?", "It is 4."), (None, "12345 säh", "two\n\nlines")]
    data = hf.write_messages(tmp_path / "t.jsonl", said)
    examples, _ = shown(
        capsys, "--model_name", folder, "--train_file", data, "--show", 2, "--regular"
    )
    for example, (_, user, assistant) in zip(examples, said, strict=True):
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        with mock.patch.object(chat_template_utils, "datetime", Clock(DATE)):
            ids = tokenizer.apply_chat_template(messages, return_dict=False)
            prompt = tokenizer.apply_chat_template(messages[:1], return_dict=False)
        assert list(example) == KEYS
        assert example["ids"] == ids
        assert example["tokens"] == tokenizer.convert_ids_to_tokens(ids)
        assert example["positions"] == list(range(len(ids)))
        assert not any(example["trained"][: len(prompt) - 1]) and sum(example["trained"]) > 1
        assert len(example["trained"]) == len(ids)


@pytest.mark.parametrize(
    "name, line",
    [
        ("llama-3", f"the chat template writes the date: dataset.date={DATE} on every day"),
        (
            "gemma-2",
            "train: the chat template takes no system message; each stands at the",
        ),
    ],
)
def test_what_a_template_does_to_the_data_is_said(name, line, tmp_path, capsys):
    folder = make_folder(tmp_path / "model", families.make_tokenizer(name))
    data = hf.write_messages(tmp_path / "t.jsonl", [("Be brief.", "What is it?", "four")] * 2)
    run.main(["--model_name", str(folder), "--train_file", data, "--show", "1", "--regular"])
    shown_lines = capsys.readouterr()
    assert line in shown_lines.err
    text = json.loads(shown_lines.out.splitlines()[0])["text"]
    assert ("26 Jul 2024" in text) == (name == "llama-3")
    assert "Be brief." in text


def test_a_pair_s_views_are_branches_that_are_compared(tmp_path, capsys):
    folder = make_folder(tmp_path / "model", hf.make_tokenizer("qwen"))
    data = hf.write_messages(tmp_path / "t.jsonl", [(None, "What is it?", "four")])
    flags = "--model_name", folder, "--train_file", data, "--show", 5
    ((example,), counts) = shown(capsys, *flags, "--predictors", 2)
    pred, answer = example["branches"]
    part, token = pred["continues"]
    assert part == 0 and example["tokens"][token] == "?"
    assert pred["tokens"] == ["<|predictor_1|>", "<|predictor_2|>"]
    assert pred["positions"] == [token + 1, token + 2]
    assert answer["continues"] is None and answer["text"] == "<|im_start|>assistant\nfour"
    assert example["compared"] == [[[1, 1], [2, len(answer["ids"]) - 1]]]
    tokens = sum(len(part["ids"]) for part in (example, pred, answer))
    assert counts == {
        "examples": 1,
        "tokens": tokens,
        "trained": sum(example["trained"]),
        "cut": 0,
        "skipped": 0,
        "without_term": 0,
        "control_tokens": 0,
        "duplicates": 0,
    }


def test_counts_are_of_what_training_would_be_fed(tmp_path, capsys):
    folder = make_folder(tmp_path / "model", hf.make_tokenizer("llama"))
    long, marker = "word " * 60, "ends with <|eot_id|> here"
    said = [
        ("Be brief.", "short", "four"),
        (None, "short", long),
        (None, long, "short"),
        (None, marker, "four"),
    ]
    data = hf.write_messages(tmp_path / "train.jsonl", said)
    other = [("Be brief.", "short", "five"), (None, "new", "four"), (None, "short", "x")]
    test = hf.write_messages(tmp_path / "eval.jsonl", other)
    flags = "--model_name", folder, "--train_file", data, "--eval_file", test, "--max_length", 64
    examples, counts = shown(capsys, *flags, "--show", 1)
    assert len(examples) == 1
    expected = {"examples": 3, "cut": 1, "skipped": 1, "control_tokens": 1, "duplicates": 2}
    assert expected.items() <= counts.items()
    assert counts["without_term"] == 1 and counts["eval"]["examples"] == 3


def test_debug_shows_two_examples_and_trains_on(tmp_path, capsys):
    folder = hf.make_folder(tmp_path / "model", "llama")
    data = hf.write_messages(tmp_path / "t.jsonl", hf.QUESTIONS)
    flags = ["--model_name", folder, "--train_file", data, "--dtype", "float32", "--debug"]
    cfg = load_settings(settings.Config, flags, aliases=settings.ALIASES).config
    said = []
    assert len(run.make_trainer(cfg, said.append).train_dataset) == len(hf.QUESTIONS)
    lines = [json.loads(line) for line in said if line.startswith("{")]
    assert [list(line) for line in lines] == [KEYS, KEYS]
    shown_alone, _ = shown(capsys, *flags[:-1], "--show", 2)
    assert shown_alone == lines


# ---- any example


@st.composite
def examples(draw):
    documents, pairs = [], []
    for number in range(draw(st.integers(1, 3))):
        trunk = draw(st.lists(st.integers(0, 50), min_size=2, max_size=9))
        branch = draw(st.lists(st.integers(51, 60), max_size=3))
        loss_on = range(draw(st.integers(1, len(trunk))), len(trunk))
        fork = draw(st.integers(0, len(trunk) - 1)) if branch else 0
        documents.append(Document(trunk, loss_on, branch, fork))
        columns = st.integers(0, len(trunk) + len(branch) - 1)
        pairs.append(((number, draw(columns)), (0, 0)))
    return Example(documents, pairs)


@given(examples())
def test_parts_and_places_are_those_of_the_packed_row(example):
    """The reference is the row that training packs: its ids, targets, positions and places."""
    batch = pack_rows([example], filler=99)
    parts, compared = parts_of(example)
    ids, positions = batch.idx.flatten(), batch.positions.flatten()
    shown_tokens = sorted((i, p) for x in parts for i, p in zip(x.ids, x.positions, strict=True))
    packed = [(i, p) for i, p in zip(ids.tolist(), positions.tolist(), strict=True) if i != 99]
    assert shown_tokens == sorted(packed)
    targets = sorted(batch.targets[batch.targets >= 0].tolist())
    trained = [i for x in parts for i, t in zip(x.ids, x.trained, strict=True) if t]
    assert sorted(trained) == targets
    for (a, b), *places in zip(
        compared, batch.pairs[0].tolist(), batch.pairs[1].tolist(), strict=True
    ):
        for (part, token), place in zip((a, b), places, strict=True):
            assert parts[part].ids[token] == ids[place]
            assert parts[part].positions[token] == positions[place]


def test_a_terminal_gets_colours_and_no_escape_of_a_text(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    document = Document([1, 2, 3, 4], range(2, 4), [7], 1)
    said = []
    show([Example([document], [((0, 2), (0, 4))])], SPELLING, said.append)
    assert said[2:] == [
        "\033[1mpart 0\033[0m\n<1><2>\033[32m<3>\033[0m\033[32m\033[7m<4>\033[0m",
        "\033[1mpart 1 continues part 0 after token 1\033[0m\n\033[7m<7>\033[0m",
        "compared: token 0 of part 1 with token 3 of part 0",
    ]
    assert printable("a\033[2J\nb\x07é") == "a\\x1b[2J\nb\\x07é"
    hostile = Spelling(None, lambda ids: "\033]0;x\x07")
    assert "\033" not in paint([1], [(False, False)], hostile)


# ---- pretraining


def show_step(capsys, *flags):
    train_gpt.show_data(load_settings(train_gpt.Config, [*map(str, flags)]).config)
    *rows, counts = map(json.loads, capsys.readouterr().out.splitlines())
    return rows, counts


def test_rows_of_text_are_those_of_the_first_step(data_path, capsys):
    flags = "--data_path", data_path, "--train_seq_len", 32, "--train_batch_tokens", 128
    rows, counts = show_step(capsys, *flags, "--show", 3, "--jepa_lambda", 1)
    cfg = load_settings(train_gpt.Config, [*map(str, flags)]).config
    data = train_gpt.open_data(cfg)
    share = train_gpt.divide_batch(cfg, 0, 1, CPU)
    (batch,) = data.load(0, share).batches
    assert [row["ids"][:-1] for row in rows] == batch.idx[:3].tolist()
    assert [row["ids"][1:] for row in rows] == batch.targets[:3].tolist()
    text = b"".join(data.token_table[token] for token in rows[0]["ids"]).decode(errors="replace")
    assert rows[0]["text"].replace(f"<{data.doc_token}>", "") == text
    assert counts["rows"] == data.num_rows
    for row in rows:  # a span is drawn between the first and the last token of a document
        for (_, start), (_, end) in row["compared"]:
            assert data.doc_token not in row["ids"][start + 1 : end + 1]


@pytest.mark.parametrize("kind", ["pairs", "groups"])
def test_pairs_and_groups_are_the_first_examples(kind, folders, capsys):
    flags = (
        "--data_path",
        folders[kind],
        "--jepa_objective",
        "pair",
        "--jepa_lambda",
        0.1,
        "--show",
        2,
    )
    examples, counts = show_step(capsys, *flags)
    assert len(examples) == 2 and all(e["compared"] and e["branches"] for e in examples)
    assert counts["examples"] > 2 and counts["duplicates"] >= 0
    examples, _ = show_step(capsys, *flags, "--jepa_lambda", 0)
    assert not any(e["compared"] for e in examples)
