"""evaluate.py: accuracy, similarity and samples of a run, and of Hugging Face models."""

import contextlib
import copy
import io
import json
import shutil
import string
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import evaluate
from conftest import ROOT, make_run, run_cli, train_run
from databases import make_pets
from hf import make_folder, make_model, make_tokenizer, write_messages
from nanojepa.eval import generation, similarity
from nanojepa.eval.predictions import open_output
from nanojepa.hf.chat import DATE, Chat
from nanojepa.records import Record, prepare_pairs
from nanojepa.settings import as_dict
from nanojepa.stats import wilson
from nanojepa.weights import load_tensors, save_weights

PAIR = ("lines with a dog", "(dog)")
QUESTIONS = [
    "What is 2 + 2?",
    "lines with words",
    "ein Haus, ein säh; 12345 67890 and lines with a vowel, zero or more times",
    "a",
    "Say it in words, please. 7",
]


def evaluated(*flags):
    """The last line that evaluate.py prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        evaluate.main([str(flag) for flag in flags])
    return json.loads(out.getvalue().splitlines()[-1])


def refused(*flags):
    """The line with which evaluate.py ends."""
    with pytest.raises(SystemExit) as e:
        evaluate.main([str(flag) for flag in flags])
    assert "\n" not in str(e.value)
    return str(e.value)


def write_lines(path, *lines):
    """A file of (user, assistant, other keys); returns its path."""
    text = ""
    for user, assistant, keys in lines:
        turns = zip(("user", "assistant"), (user, assistant), strict=True)
        messages = [{"role": role, "content": content} for role, content in turns]
        text += json.dumps({"messages": messages, **keys}) + "\n"
    path.write_text(text)
    return str(path)


# ---- a run


def leave_run(run, folder):
    """Write what a finished run leaves behind."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(as_dict(run.cfg)))
    save_weights(folder / "model.safetensors", run.model.state_dict())
    if run.objective is not None and run.objective.state_dict():
        save_weights(folder / "objective.safetensors", run.objective.state_dict())
    return folder


def pairs_of(count):
    words = ("dog", "cat", "cow", "hen")
    names = [(i, word) for i in range(count // 4) for word in words]
    return [(f"lines with a {word} {i}", f"({word}){{{i}}}") for i, word in names]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has learnt 16 pairs by heart, and a test file: six of them, two others."""
    torch.set_num_threads(1)
    base, train = tmp_path_factory.mktemp("trained"), pairs_of(16)
    test = [*train[:6], ("lines with a pig 9", "(pig)"), (train[0][0], "wrong")]
    sets = [
        [Record(n, "pairs", None, list(pair)) for n, pair in enumerate(pairs, 1)]
        for pairs in (train, test)
    ]
    prepare_pairs(base / "data", *sets, source="test_evaluate.py", vocab_size=300)
    run = make_run(
        str(base / "data"),
        iterations=100,
        train_seq_len=64,
        model_dim=64,
        num_layers=2,
        loss_on="target",
        jepa_objective="pair",
        jepa_lambda=0.02,
        jepa_pred_tokens=2,
        jepa_predictor="linear",
        matrix_lr=0.02,
    )
    train_run(run)
    file = write_messages(base / "test.jsonl", [(None, *pair) for pair in test])
    return leave_run(run, base / "run"), file


def test_accuracy_of_a_run_that_knows_its_pairs(trained, tmp_path):
    run, test = trained
    result = evaluated("accuracy", "--run", run, "--data", test)
    names = {"exact", "startswith", "exact_clean", "startswith_clean", "n", "n_clean", "seconds"}
    assert result.keys() == names | {"exact_wilson95", "startswith_wilson95", "test_sha256"}
    assert result["exact"] == 6 / 8 and result["n"] == 8
    assert result["exact_wilson95"] == list(wilson(6, 8))
    assert result["n_clean"] == 1 and result["exact_clean"] == 0
    assert json.loads((run / "accuracy-test.json").read_text()) == result
    again = evaluated("accuracy", "--run", run, "--data", test, "--batch_size", 3)
    assert again["exact"] == 6 / 8
    # What is generated starts with these, and is not they.
    begins = [(None, text, code[:4]) for text, code in pairs_of(16)]
    prefixes = write_messages(tmp_path / "prefixes.jsonl", begins)
    result = evaluated("accuracy", "--run", run, "--data", prefixes)
    assert result["startswith"] == 1 and result["exact"] == 0


def cosines_alone(run, test, predictor):
    """The cosine of each pair of views, every view encoded by itself."""
    cosines, preds = [], run.data.preds
    for text, code in evaluate.read_test(run, test, "pairs", "stop"):
        u, v = (
            run.model._run_blocks(torch.tensor([[run.data.doc_token, *ids]]), -1)[0][0, -1]
            for ids in ([*run.encode(text), *preds], run.encode(code))
        )
        u, v = (x / x.square().mean().sqrt() for x in (u, v))
        cosines.append(torch.cosine_similarity(predictor @ u, v, dim=0).item())
    return torch.tensor(cosines)


def test_similarity_is_that_of_the_views_alone(trained, tmp_path):
    folder, test = trained
    flags = ("similarity", "--run", folder, "--data", test)
    result = evaluated(*flags, "--batch_size", 3, "--plot", tmp_path / "views.png")
    run = evaluate.open_run(folder, evaluate.view_settings)
    assert run.cfg.jepa_pred_tokens == 2
    predictor = load_tensors(folder / "objective.safetensors")["predictor.weight"]
    assert (predictor - torch.eye(64)).norm() > 0.1
    with torch.no_grad():
        cosines = cosines_alone(run, test, predictor)
    assert result["pairs"] == 8 and result["skipped"] == 0
    assert result["matched"]["mean"] == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert result["matched"]["q50"] == pytest.approx(cosines.quantile(0.5).item(), abs=1e-5)
    assert -1 <= result["shuffled"]["mean"] <= 1 and len(result["singular_values"]) == 8
    assert json.loads((folder / "similarity-test.json").read_text()) == result
    assert (tmp_path / "views.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def copy_run(folder, to, **changes):
    """A run with other settings in its config.yaml."""
    shutil.copytree(folder, to)
    cfg = yaml.safe_load((to / "config.yaml").read_text()) | changes
    (to / "config.yaml").write_text(yaml.safe_dump(cfg))
    return to


def test_a_run_that_compares_no_texts_has_the_default_views(trained, tmp_path):
    """Its [PRED] tokens and its predictor mean nothing there."""
    folder, test = trained
    results = []
    for name, changes in {"span": {"jepa_objective": "span"}, "none": {"jepa_lambda": 0.0}}.items():
        other = copy_run(folder, tmp_path / name, **changes)
        results.append(evaluated("similarity", "--run", other, "--data", test)["matched"])
    run = evaluate.open_run(other, evaluate.view_settings)
    assert run.data.preds == () and run.cfg.jepa_lambda == 0
    with torch.no_grad():
        cosines = cosines_alone(run, test, torch.eye(64))
    assert results[0] == results[1]
    assert results[0]["mean"] == pytest.approx(cosines.mean().item(), abs=1e-5)


def test_examples_that_fit_no_row_are_counted(trained, tmp_path):
    folder, test = trained
    long, both = tmp_path / "long.jsonl", tmp_path / "both.jsonl"
    write_messages(long, [(None, "x y z " * 40, "(x)")])
    both.write_text(long.read_text() + Path(test).read_text())
    result = evaluated("similarity", "--run", folder, "--data", both)
    assert (result["pairs"], result["skipped"]) == (8, 1)
    said = refused("similarity", "--run", folder, "--data", long)
    assert "0 of its examples have views that fit a row of TRAIN_SEQ_LEN=64" in said


def test_paraphrases_are_pairs_of_neighbours(folders, tmp_path):
    run = make_run(folders["groups"], jepa_objective="pair", jepa_lambda=0.1)
    folder, groups = leave_run(run, tmp_path / "run"), [["ab", "cd", "ef"], ["fed", "cab"]]
    data = tmp_path / "groups.jsonl"
    data.write_text("".join(json.dumps({"paraphrases": group}) + "\n" for group in groups))
    assert evaluated("similarity", "--run", folder, "--data", data)["pairs"] == 3
    pairs = write_messages(tmp_path / "pairs.jsonl", [(None, *PAIR)])
    said = refused("similarity", "--run", folder, "--data", pairs)
    assert "pairs.jsonl holds pairs, here groups are needed" in said


def test_prompt_samples_by_seed(trained):
    def sample(seed, temperature):
        flags = ("--seed", seed, "--temperature", temperature, "--tokens", 20)
        return evaluated("sample", "--run", trained[0], "--prompt", "lines with", *flags)["text"]

    assert sample(1, 1.5) == sample(1, 1.5)
    assert len({sample(seed, 1.5) for seed in range(4)}) > 1
    assert sample(1, 0) == sample(2, 0)


def test_a_run_on_text_writes_a_sample_and_nothing_else(data_path, tmp_path):
    folder = leave_run(make_run(data_path, jepa_lambda=0.1), tmp_path / "run")
    result = evaluated("sample", "--run", folder, "--prompt", "the cat", "--tokens", 5)
    assert result["prompt"] == "the cat"
    assert json.loads((folder / "sample.json").read_text()) == result
    data = write_messages(tmp_path / "x.jsonl", [(None, *PAIR)])
    for command in ("accuracy", "similarity"):
        said = refused(command, "--run", folder, "--data", data)
        assert "was trained on text" in said and said.endswith("choose sample")


@pytest.mark.slow
def test_a_run_of_train_gpt_is_evaluated(folders, run_id, tmp_path):
    flags = (f"--run_id={run_id}", "--iterations=2", "--jepa_lambda=0.1", "--jepa_objective=pair")
    done = run_cli(folders["pairs"], *flags, "--grad_accum_steps=1", "--jepa_predictor=linear")
    assert done.returncode == 0, done.stderr[-2000:]
    of = ("--run", ROOT / "logs" / run_id, "--data")
    texts = ("abc", "fed", "cab", "deaf", "fade", "bad")
    data = write_messages(tmp_path / "d.jsonl", [(None, text, text[::-1]) for text in texts])
    assert evaluated("accuracy", *of, data)["n"] == 6
    result = evaluated("similarity", *of, data)
    assert result["pairs"] == 6 and len(result["singular_values"]) == 6
    assert result["linear_map_error"]["fit"] < 1e-6 < result["linear_map_error"]["held_out"]


# ---- generation of a Hugging Face model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose folder asks for sampling and for a punishment of repetitions."""
    folder = make_folder(tmp_path_factory.mktemp("hf") / "model", "llama")
    settings = {"do_sample": True, "temperature": 1.7, "top_p": 0.8, "repetition_penalty": 1.9}
    settings |= {"eos_token_id": 5, "max_length": 20}
    with open(f"{folder}/generation_config.json", "w") as file:
        json.dump(settings, file)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    args = SimpleNamespace(model=folder, trust_remote_code=False)
    return evaluate.open_chat(args, torch.float32, False)


@torch.no_grad()
def greedy(model, chat, prompt, limit):
    """The text, one plain forward pass a token, no padding and no cache."""
    new = []
    while len(new) < limit:
        token = model(torch.tensor([prompt + new])).logits[0, -1].argmax().item()
        if token in chat.stop_tokens:
            break
        new.append(token)
    return chat.tokenizer.decode(new, skip_special_tokens=True)


@pytest.fixture(scope="module")
def said(loaded):
    """What the model says to each question, in 12 tokens."""
    model, chat = loaded
    texts = [greedy(model, chat, chat.prompt(None, q), 12).strip() for q in QUESTIONS]
    assert len(set(texts)) == len(texts) and all(texts)
    return texts


@pytest.fixture
def exact_file(said, tmp_path):
    """A file of five lines, of which the model gets the second and the last wrong."""
    answers = [text if n not in (1, 4) else "no" for n, text in enumerate(said)]
    lines = [(None, *texts) for texts in zip(QUESTIONS, answers, strict=True)]
    return write_messages(tmp_path / "data.jsonl", lines)


def test_batches_give_what_each_prompt_gives_alone(loaded):
    model, chat = loaded
    systems = [None, "You answer in one word."] * 3
    prompts = [chat.prompt(s, q) for s, q in zip(systems, QUESTIONS, strict=False)]
    assert len({len(prompt) for prompt in prompts}) > 2
    new = generation.generate(model, chat, prompts, 12)[:, max(map(len, prompts)) :].tolist()
    alone = [greedy(model, chat, prompt, 12) for prompt in prompts]
    assert [generation.text_of(chat, row) for row in new] == alone


def test_generation_ends_at_the_first_stop_token(loaded):
    model, chat = loaded
    prompts = [chat.prompt(None, QUESTIONS[n]) for n in (0, 2)]
    full = generation.generate(model, chat, prompts[:1], 12)[0, len(prompts[0]) :].tolist()
    # It is no special token, so decoding would keep it.
    stops = copy.copy(chat)
    stops.stop_tokens = [full[4]]
    new = generation.generate(model, stops, prompts, 12)[0, -12:].tolist()
    kept = full[: full.index(full[4])]
    assert generation.text_of(stops, new) == chat.tokenizer.decode(kept)


def test_decoding_keeps_every_space():
    tokenizer, text = make_tokenizer("llama"), "( a . b ) , do n't ? "
    tokenizer.clean_up_tokenization_spaces = True
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    chat = Chat(tokenizer)
    assert generation.text_of(chat, chat.encode(text) + [chat.end] + chat.encode("more")) == text


def test_choice_is_the_likeliest_letter(loaded, monkeypatch):
    """Of the alphabet: among four, this model has one favourite."""
    model, chat = loaded
    monkeypatch.setattr(generation, "LETTERS", string.ascii_letters)
    prompts = [chat.prompt(None, question) for question in QUESTIONS]
    tokens = chat.tokenizer.convert_tokens_to_ids(list(string.ascii_letters))
    with torch.no_grad():
        logits = [model(torch.tensor([prompt])).logits[0, -1, tokens] for prompt in prompts]
    best = [string.ascii_letters[row.argmax()] for row in logits]
    assert generation.choose_letters(model, chat, prompts) == best and len(set(best)) > 1
    one = copy.copy(chat)
    one.conversation = lambda *_: chat.conversation(None, "?", "A")
    with pytest.raises(ValueError, match="can't choose"):
        generation.choose_letters(model, one, prompts)


# ---- accuracy of a Hugging Face model


def test_accuracy_of_a_folder(folder, exact_file, tmp_path, capfd):
    output = tmp_path / "out.jsonl"
    flags = ("--task", "exact", "--output", output, "--tokens", 12, "--batch_size", 2)
    result = evaluated("accuracy", "--model", folder, "--data", exact_file, *flags)
    assert (result["task"], result["accuracy"], result["n"]) == ("exact", 3 / 5, 5)
    assert result["wilson95"] == list(wilson(3, 5))
    assert json.loads((tmp_path / "accuracy-data-exact.json").read_text()) == result
    header, *lines = map(json.loads, output.read_text().splitlines())
    assert header["task"] == "exact" and len(header["data_sha256"]) == 64
    assert sorted(line["line"] for line in lines if line["correct"]) == [1, 3, 4]
    complaints = capfd.readouterr().err
    assert not any(word in complaints for word in ("temperature", "do_sample", "top_p", "flags"))


def test_a_killed_run_goes_on_where_it_stopped(folder, said, tmp_path, monkeypatch):
    output, begins = tmp_path / "out.jsonl", [text[:1] for text in said]
    begins[1], begins[2] = "no", said[2][:8]
    questions = zip(QUESTIONS, begins, [{}] * 5, strict=True)
    data = write_lines(tmp_path / "data.jsonl", *questions)
    # Without --tokens; their number is that of all lines.
    flags = ("accuracy", "--model", folder, "--data", data, "--task", "startswith")
    flags += ("--output", output, "--batch_size", 2)
    whole = evaluated(*flags)
    assert whole["accuracy"] == 4 / 5
    lines = output.read_bytes().splitlines(keepends=True)
    asked, generate = [], generation.generate

    def note(model, chat, prompts, limit):
        asked.extend(prompts)
        return generate(model, chat, prompts, limit)

    monkeypatch.setattr(generation, "generate", note)
    for kept in (3, 1, 0):  # so many lines are whole; the next one is torn
        asked.clear()
        output.write_bytes(b"".join(lines[:kept]) + lines[kept][:10])
        again = evaluated(*flags)
        assert again | {"seconds": 0} == whole | {"seconds": 0}
        assert len(asked) == 5 - max(0, kept - 1)
        assert sorted(output.read_bytes().splitlines(keepends=True)) == sorted(lines)
    monkeypatch.setattr(evaluate, "open_chat", None)  # a finished file needs no model
    assert evaluated(*flags)["accuracy"] == whole["accuracy"]


def test_an_output_of_something_else_is_left_alone(folder, exact_file, tmp_path):
    output = tmp_path / "out.jsonl"
    flags = ("accuracy", "--model", folder, "--data", exact_file, "--output", output)
    evaluated(*flags, "--task", "exact", "--tokens", 2)
    before = output.read_bytes()
    said = refused(*flags, "--task", "startswith", "--tokens", 3)
    assert said.endswith("model, data, task and flags; choose another --output, or remove it")
    assert output.read_bytes() == before
    foreign = (b"my notes", b"my notes\n", b'{"line": 3}\n', before + b"{}\n", b"[1]\n")
    for content in foreign:
        output.write_bytes(content)
        said = refused(*flags, "--task", "exact", "--tokens", 2)
        assert "choose another --output, or remove it" in said
        assert output.read_bytes() == content


@pytest.mark.parametrize(
    "old, new",
    [
        ('"line"', '"linf"'),
        ('"line": 1', '"line": [1]'),
        ("{", ""),
        ('{"line"', '\xff{"line"'),
    ],
)
def test_a_damaged_prediction_is_named_by_its_line(tmp_path, old, new):
    header, path = {"task": "choice"}, tmp_path / "p.jsonl"
    prediction = {"prediction": "A", "correct": True}
    lines = [json.dumps({"line": n} | prediction) for n in (3, 1)]
    path.write_text("\n".join([json.dumps(header), *lines, '{"line": 2, "pre']))
    done = open_output(path, header)
    assert done == {n: json.loads(line) for n, line in zip((3, 1), lines, strict=True)}
    damaged = lines[1].replace(old, new)
    path.write_text("\n".join([json.dumps(header), lines[0], damaged, ""]), encoding="latin-1")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"p\.jsonl, line 3: no prediction; [^\n]*$"):
        open_output(path, header)
    assert path.read_bytes() == before


def test_a_model_trained_anew_does_not_inherit_predictions(tmp_path):
    data = write_lines(tmp_path / "d.jsonl", ("u", "a", {}))
    flags = ("accuracy", "--model", make_folder(tmp_path / "m", "llama"), "--data", data)
    evaluated(*flags, "--task", "exact", "--tokens", 2)
    make_model("llama", 320, seed=1).save_pretrained(tmp_path / "m")
    assert "isn't of this model" in refused(*flags, "--task", "exact", "--tokens", 2)


def test_tasks_of_a_file_are_reported_each_and_together(folder, loaded, said, tmp_path):
    prompts = [loaded[1].prompt(None, question) for question in QUESTIONS[:2]]
    best, other = generation.choose_letters(*loaded, prompts)
    worst = "A" if other != "A" else "B"
    data = write_lines(
        tmp_path / "mixed.jsonl",
        (QUESTIONS[0], best, {"task": "choice"}),
        (QUESTIONS[1], worst, {"task": "choice"}),
        (QUESTIONS[2], said[2], {"task": "exact"}),
        (QUESTIONS[3], said[3][:2], {"task": "startswith"}),
        (QUESTIONS[4], "SELECT 1", {"task": "spider", "db_id": "pets"}),
        (QUESTIONS[4], "#### 4", {"task": "gsm8k"}),
    )
    flags = ("accuracy", "--model", folder, "--data", data, "--tokens", 12)
    flags += ("--output", tmp_path / "p.jsonl")
    result = evaluated(*flags, "--databases", make_pets(tmp_path))
    assert (result["task"], result["n"], result["accuracy"]) == ("mixed", 6, 3 / 6)
    accuracies = {task: counts["accuracy"] for task, counts in result["tasks"].items()}
    right = {"choice": 0.5, "exact": 1, "startswith": 1, "spider": 0, "gsm8k": 0}
    assert accuracies == right
    (tmp_path / "p.jsonl").unlink()
    assert "mixed.jsonl, line 5: its task is spider; give --databases" in refused(*flags)


def test_settings_of_the_folder_are_followed(loaded, said, tmp_path):
    folder = make_folder(tmp_path / "m", "llama")
    chat = Chat(make_tokenizer("llama"), plain=True)
    text = greedy(loaded[0], chat, chat.prompt(None, QUESTIONS[0]), 12).strip()
    assert text != said[0]
    line = (QUESTIONS[0], f"<think>hm</think>{text}", {"task": "exact"})
    data = write_lines(tmp_path / "d.jsonl", line)

    def accuracy(name, *flags):
        flags += ("--tokens", 12, "--output", tmp_path / name)
        return evaluated("accuracy", "--model", folder, "--data", data, *flags)["accuracy"]

    assert accuracy("1") == 0 and accuracy("2", "--plain") == 1
    config = tmp_path / "m" / "config.yaml"
    config.write_text("dataset: {plain: true, remove_thinking: true}")
    assert accuracy("3") == 1
    config.write_text("dataset: {plain: true, remove_thinking: false}")
    assert accuracy("4") == 0
    for foreign in ("", "dataset: 7", "other: true", "dataset: {plain: ["):
        config.write_text(foreign)
        assert evaluate.text_settings(folder) == (False, True, DATE)
    config.write_text("dataset: {plain: false, remove_thinking: true, date: '1999-12-31'}")
    assert evaluate.text_settings(folder) == (False, True, "1999-12-31")


def test_a_prompt_that_fills_the_window_is_named(folder, tmp_path, monkeypatch):
    lines, sizes, generate = [("u", "a", {}), ("7 " * 300, "a", {})], [], generation.generate
    data = write_lines(tmp_path / "d.jsonl", *lines)
    flags = ("accuracy", "--model", folder, "--task", "exact", "--data")
    said = refused(*flags, data, "--output", tmp_path / "o")
    assert "line 2 of --data: its prompt has" in said and "tokens, the model takes 256" in said

    def note(model, chat, prompts, limit):
        sizes.append(len(prompts[0]) + limit)
        return generate(model, chat, prompts, limit)

    monkeypatch.setattr(generation, "generate", note)
    data = write_lines(tmp_path / "e.jsonl", ("7 " * 105, "a", {}))
    evaluated(*flags, data, "--tokens", 999, "--output", tmp_path / "p")
    assert sizes == [256]  # the window cuts the generation, not the run


def test_an_adapter_answers_as_the_merged_model(tmp_path):
    peft = pytest.importorskip("peft")
    from nanojepa.hf.model import Base, add_pred_tokens, embed_new_tokens

    base = make_folder(tmp_path / "base", "llama")
    model, tokenizer = make_model("llama", 320), make_tokenizer("llama")
    model.config._name_or_path = model.name_or_path = base
    preds = add_pred_tokens(tokenizer, 3)  # tokens that the base's embedding lacks
    embed_new_tokens(model, Base(model.config, tokenizer, *preds), print)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)
    model = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.5)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    for name in ("adapter", "merged"):
        tokenizer.save_pretrained(tmp_path / name)
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    data = write_messages(tmp_path / "d.jsonl", [(None, question, "a") for question in QUESTIONS])

    def predictions(name):
        flags = ("--data", data, "--task", "exact", "--tokens", 12)
        evaluated("accuracy", "--model", tmp_path / name, *flags)
        return (tmp_path / name / "predictions-d-exact.jsonl").read_text().splitlines()[1:]

    assert predictions("adapter") == predictions("merged") != predictions("base")


# ---- statistics of views


def random_views(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator)


def test_statistics_of_views_against_loops():
    u, v = random_views(9, 4)
    group = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5])
    found = similarity.compare_views(u, v, group)

    def cosine(a, b):
        return (a @ b / a.norm() / b.norm()).item()

    matched = sorted(cosine(u[i], v[i]) for i in range(9))
    others = [(i, (i - 4) % 9) for i in range(9)]
    shuffled = [cosine(u[i], v[j]) for i, j in others if group[i] != group[j]]
    assert found["matched"]["mean"] == pytest.approx(sum(matched) / 9, abs=1e-6)
    assert found["matched"]["q50"] == pytest.approx(matched[4], abs=1e-6)
    mean = sum(shuffled) / len(shuffled)
    assert found["shuffled"]["mean"] == pytest.approx(mean, abs=1e-6)
    values, difference = found["singular_values"], u - v
    assert found["pairs"] == 9 and found["dimensions"] == len(values) == 4
    energy = sum(s * s for s in values)
    assert energy == pytest.approx(difference.square().sum().item(), rel=1e-5)
    largest = torch.linalg.matrix_norm(difference, 2).item()
    assert values[0] == pytest.approx(largest, rel=1e-5)
    many = similarity.compare_views(*random_views(130, 120), torch.arange(130))
    assert len(many["singular_values"]) == 100


def test_linear_map_error_is_honest_about_examples_it_has_not_seen():
    def errors(u, v, group=None):
        group = torch.arange(len(u)) if group is None else group
        return similarity.compare_views(u, v, group)["linear_map_error"]

    (u, noise), (matrix, _) = random_views(60, 8), random_views(8, 8, 1)
    exact = errors(u, u @ matrix)
    assert exact["fit"] < 1e-6 and exact["held_out"] < 1e-6 and exact["fit_pairs"] == 30
    assert 0.7 < errors(u, noise)["fit"] < 1 < errors(u, noise)["held_out"]
    few = errors(*random_views(20, 40))  # fewer examples than dimensions
    assert few["fit"] < 1e-6 and few["held_out"] > 0.8
    flat = torch.cat((u, torch.zeros(60, 3)), 1)  # rank 8 of 11
    assert errors(flat, flat @ random_views(11, 11)[0])["held_out"] < 1e-6
    assert errors(torch.ones(9, 3), torch.ones(9, 3))["held_out"] < 1e-6
    # Each four times: a half that shared examples with the other one would know the answer.
    paraphrases = [views.repeat_interleave(4, 0) for views in random_views(20, 40)]
    assert errors(*paraphrases, torch.arange(20).repeat_interleave(4))["held_out"] > 0.8
    with pytest.raises(ValueError, match="needs two examples"):
        errors(u, u, torch.zeros(60))
    with pytest.raises(ValueError, match="infinities or NaN"):
        errors(u / 0, u)


def test_similarity_of_a_model_and_its_plot(folder, exact_file, tmp_path, monkeypatch):
    asked, views = [], similarity.EncodedViews(*random_views(5, 16), torch.arange(5))

    def views_of(model, chat, of, records):
        asked.extend(record.line for record in records)
        assert of == folder and model.config.hidden_size and not chat.plain
        return "views", "of it"

    def states_of_views(*given):
        assert given == ("views", "of it", 3)
        return views

    monkeypatch.setattr("nanojepa.hf.run.views_of", views_of)
    flags = ("similarity", "--model", folder, "--data", exact_file, "--batch_size", 3)
    with monkeypatch.context() as encoding:
        encoding.setattr(similarity, "states_of_views", states_of_views)
        result = evaluated(*flags, "--plot", tmp_path / "p.png")
    assert sorted(asked) == [1, 2, 3, 4, 5] and asked != sorted(asked)
    assert result["skipped"] == 0 and result["pairs"] == 5
    expected = similarity.compare_views(*views)
    assert {name: result[name] for name in expected} == expected
    with open(f"{folder}/similarity-data.json") as file:
        assert json.load(file) == result
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # Views that have all become one vector are drawn too.
    same = expected | {"singular_values": [1e-9, 0.0]}
    similarity.draw_views(tmp_path / "q.png", torch.ones(2, 3), torch.ones(2, 3), same)
    monkeypatch.delitem(sys.modules, "nanojepa.eval.similarity")
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    assert 'sklearn.manifold is missing: pip install -e ".[finetune,eval]"' in refused(*flags)


# ---- misuse


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "the following arguments are required: accuracy|score|similarity|sample"),
        ("accuracy --data DATA", "one of the arguments --run --model is required"),
        ("accuracy --run x --model y --data DATA", "not allowed with argument --run"),
        ("accuracy --model FOLDER", "required: --data"),
        ("sample --model FOLDER --prompt x", "one of the arguments --run is required"),
        ("accuracy --run x --data DATA --task exact", "--task belongs to --model"),
        ("accuracy --run x --data DATA --plain", "--plain belongs to --model"),
        ("accuracy --run x --data DATA --plot y", "unrecognized arguments: --plot y"),
        ("similarity --model FOLDER --data DATA --dtype bf16", "unrecognized arguments: --dtype"),
        ("accuracy --model FOLDER --data DATA", "line 1: no task"),
        ("accuracy --model /nowhere --data DATA", "/nowhere: no such folder"),
        ("accuracy --model EMPTY --data DATA --task exact", "cannot be loaded"),
        ("accuracy --model FOLDER --data /no.jsonl --task exact", "/no.jsonl: No such file"),
        ("accuracy --model FOLDER --data DATA --task exact --tokens 0", "0: must be above 0"),
        ("accuracy --model FOLDER --data DATA --task gsm8k", 'line 1: no "#### number"'),
        ("sample --run /nowhere --prompt x", "no config.yaml in it"),
        ("accuracy --run RUN --data /no.jsonl", "/no.jsonl: No such file"),
        ("accuracy --run RUN --data GROUPS", "holds groups, here pairs are needed"),
    ],
)
def test_misuse_is_one_line(request, folder, exact_file, tmp_path, flags, message):
    groups = tmp_path / "groups.jsonl"
    groups.write_text(json.dumps({"paraphrases": ["a", "b"]}) + "\n")
    names = {"FOLDER": folder, "DATA": exact_file, "EMPTY": tmp_path, "GROUPS": groups}
    if "RUN" in flags:
        names["RUN"] = request.getfixturevalue("trained")[0]
    output = ["--output", tmp_path / "o"] if "--task" in flags and "--model" in flags else []
    assert message in refused(*[names.get(flag, flag) for flag in flags.split()], *output)


def test_tokens_that_the_embedding_lacks_are_refused_with_both_sizes(tmp_path):
    folder, tokenizer = make_folder(tmp_path / "m", "llama"), make_tokenizer("llama")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|user|>' if m.role == 'user' }}{{ m.content }}"
        "{{ eos_token }}{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    data = write_messages(tmp_path / "d.jsonl", [(None, "one", "a")])
    rows = len(tokenizer) - 1
    refused = (
        f"line 1 of --data: its prompt has token {rows}, .* {rows} rows for the {rows + 1} tokens"
    )
    with pytest.raises(SystemExit, match=refused):
        evaluated("accuracy", "--model", folder, "--data", data, "--task", "exact")


# ---- texts of another program


def score(capsys, *flags):
    evaluate.main(["score", *map(str, flags)])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


RECORDS = [
    {"question": "Where is the Louvre?", "answer": ["Paris", "in Paris"], "id": 1},
    {"question": "How many people?", "answer": ["1,000"], "id": 2},
    {"question": "Who?", "answer": ["Ada"], "id": 3},
]
SAID = ["<think>Berlin?</think>It is Paris.", "about 1000", "Bob"]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_texts_are_scored_without_a_model(tmp_path, capsys, monkeypatch):
    """Torch's models and transformers aren't even imported: as on a laptop."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    rows = [row | {"prediction": text} for row, text in zip(RECORDS, SAID, strict=True)]
    file = write_rows(tmp_path / "vllm.jsonl", rows)
    found = score(capsys, "--task", "nq_open", "--predictions", file)
    assert found.pop("seconds") >= 0
    assert found == {
        "task": "nq_open",
        "accuracy": 2 / 3,
        "wilson95": list(wilson(2, 3)),
        "n": 3,
        "upstream_accuracy": 0.0,
    }
    saved = json.loads((tmp_path / "score-vllm-nq_open.json").read_text())
    assert saved["accuracy"] == 2 / 3
    kept = score(capsys, "--task", "exact", "--predictions", file, "--keep_thinking")
    assert kept["accuracy"] == 0


@pytest.mark.parametrize("lines", [False, True], ids=["in order", "by line"])
def test_records_may_stand_beside_the_texts(tmp_path, capsys, lines):
    data = write_rows(tmp_path / "test.jsonl", RECORDS)
    rows = [{"prediction": text} for text in SAID]
    if lines:
        rows = [{"line": n, **row} for n, row in enumerate(rows, 1)][::-1]
    file = write_rows(tmp_path / "said.jsonl", rows)
    flags = "--task", "nq_open", "--predictions", file, "--data", data
    assert score(capsys, *flags)["accuracy"] == 2 / 3
    for wrong, message in (
        (rows[:2], "no prediction for line 1" if lines else "2 predictions for 3 records"),
        ([{"text": "x"}], 'line 1: no text in the key "prediction"'),
        ([{"prediction": "x", "line": [1]}], 'line 1: its "line" is no number'),
        ([{"prediction": "x", "line": 1}] * 2, 'two predictions for one "line"'),
    ):
        write_rows(file, wrong)
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            score(capsys, *flags)


def test_what_accuracy_wrote_is_scored_to_the_same(tmp_path, capsys):
    folder = make_folder(tmp_path / "model", "llama")
    data = write_messages(tmp_path / "d.jsonl", [(None, q, "a") for q in QUESTIONS])
    flags = "--data", data, "--task", "startswith"
    made = evaluated("accuracy", "--model", folder, *flags, "--tokens", 6)
    file = tmp_path / "model" / "predictions-d-startswith.jsonl"
    again = score(capsys, "--predictions", file, *flags)
    for result in (made, again):
        result.pop("seconds")
    assert again == made
