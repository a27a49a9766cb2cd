"""finetune.py's step against a plain reference that runs every view by itself, unpacked, written from FIELD-style formulas and
from templates spelt out by hand; and its runs: resume, ranks, saved models, settings."""
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM, Gemma2Config, Gemma2ForCausalLM, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM, TrainerCallback

import bench
import chat
import evaluate
import layouts
import finetune
import hf
import jepa
from config import load_sections
from conftest import ROOT
from data.pairs import read_jsonl
from data.shards import read_sealed
from test_corrupt import mutations

KINDS = ("llama", "qwen", "neox")
QUESTIONS = [("Be brief." if n % 3 else None, f"What is {n} + {n + 1}?" + " Say it." * (n % 4), f"First {n}.\n\nThen {2 * n + 1}{'!' * (n % 3)}\n\n#### {2 * n + 1}") for n in range(8)]
TEXTS = {"llama": ("<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"), "qwen": ("", "<|im_start|>{}\n", "<|im_end|>\n")}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: hf.make_folder(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return hf.write_messages(tmp_path_factory.mktemp("data") / "questions.jsonl", QUESTIONS)


def configure(model, data, out, *flags):
    return load_sections(finetune.Config, ["--model_name", model, "--train_file", data, "--output_dir", str(out), "--dtype", "float32", *flags], finetune.ALIASES)[0]


def make_trainer(*arguments):
    trainer = finetune.make_trainer(configure(*arguments), say=lambda line: None)
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return trainer


class Keep(TrainerCallback):
    """The gradients that the optimizer is about to use."""
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_step(trainer):
    """({name: gradient} of the step as the Trainer makes it, its line of losses)."""
    keep = Keep()
    trainer.add_callback(keep)
    trainer.args.max_grad_norm, trainer.args.max_steps = 0, 1
    trainer.args.save_strategy = "no"
    trainer.train()
    return keep.gradients, next(line for line in trainer.state.log_history if "ce_loss" in line)


def views_of(folder, records, batch_size):
    model, talk = evaluate.open_model(str(folder), torch.float32, False, False)
    return finetune.views_of(model, talk, folder, records, batch_size)


# ---- the plain reference


def written(kind, system, user, assistant):
    """The texts before the user's content, between it and the assistant's, and the end token, as the family's template has them."""
    if kind == "neox":  # refuses a system role: it is merged
        return "Question: ", (f"{system}\n\n" if system else "") + user, "\nAnswer: ", assistant, "<|endoftext|>"
    begin, header, close = TEXTS[kind]
    before = begin + (header.format("system") + system + close if system else "") + header.format("user")
    return before, user, close + header.format("assistant"), assistant, close.strip()


def reference(trainer, kind, records, mode="pair", views="prefix", k=0, front=False, reverse=False, distance="cosine", span_of=None, train_all=False):
    """(CE, JEPA, gradients of gamma * CE + lbd * JEPA) with one forward pass a view."""
    tokenizer, model, t = trainer.processing_class, trainer.model, trainer.cfg.training
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    preds = encode("".join(f"<|predictor_{n + 1}|>" for n in range(k)))
    assert len(preds) == k
    start = [tokenizer.bos_token_id if tokenizer.bos_token else tokenizer.eos_token_id]

    def states(ids):
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        return out.hidden_states[-1][0], out.logits[0]  # the last one is behind the final norm

    ce, labels, terms = 0, 0, []
    for n, (system, user, answer) in enumerate(records):
        before, user, between, answer, end = written(kind, system, user, answer)
        prompt, reply = encode(before + user + between), encode(answer)
        whole = prompt + reply + encode(end)
        h, logits = states(whole)
        first = 1 if train_all else len(prompt)
        ce = ce + F.cross_entropy(logits[first - 1:-1], torch.tensor(whole[first:]), reduction="sum")
        labels += len(whole) - first
        if mode == "span":
            a, b, s, e = span_of[n]
            assert (s, e) == (len(encode(before)), len(prompt) + len(reply) - 1)
            terms.append(((h[a - 1] - h[s]) + (h[e] - h[b]), h[b] - h[a - 1]))
        elif mode in ("pair", "step"):
            if mode == "step":
                one, two, *_ = answer.split("\n\n")
                content = one + "\n\n", two + "\n\n"
                sides = [(before + user + between, content[0]), (None, content[1])]
            elif views == "prefix":
                sides = [(before, user), (None, answer)]
            else:
                raw = QUESTIONS[n][1]  # without the system message
                lead = {"neox": ("Question: ", " "), **{x: (b + h.format("user"), b + h.format("assistant")) for x, (b, h, _) in TEXTS.items()}}[kind]
                sides = [(lead[0], raw), (lead[1], answer)]
            ends = []
            for i, (lead, content) in enumerate(sides):
                lead = start if lead is None else encode(lead)
                mine = preds if i == (1 if reverse else 0) else []
                ids = lead + (mine + encode(content) if front else encode(content) + mine)
                ends.append(states(ids)[0][-1])
            u, v = ends[::-1] if reverse else ends
            predictor = getattr(model, "jepa_predictor", None)
            terms.append((u if predictor is None else predictor(u), v))
    ce, term = ce / labels, 0
    for u, v in terms:
        term = term + {"cosine": lambda: 1 - (u @ v) / (u.norm() * v.norm()), "l2": lambda: (u - v).norm(), "mse": lambda: ((u - v) ** 2).mean()}[distance]() / len(terms)
    loss = t.gamma * ce + (t.lbd * term if terms else 0)
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    return float(ce.detach()), float(term.detach()) if terms else 0.0, dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True)))


def assert_same(trainer, kind, **options):
    ce, term, expected = reference(trainer, kind, QUESTIONS, **options)
    found, line = one_step(trainer)
    assert line["ce_loss"] == pytest.approx(ce, rel=1e-5)
    if term:
        assert line["jepa_loss"] == pytest.approx(term, rel=1e-4)  # of order 1, from cosines in float32
    scale = max(g.abs().max() for g in expected.values() if g is not None)
    for name, g in expected.items():
        if g is None:
            assert not found[name].any()
        else:  # float32 sums in another order: 1e-7 of the largest, times the width of a sum
            torch.testing.assert_close(found[name], g, rtol=1e-3, atol=2e-5 * scale.item(), msg=lambda text: f"{name}: {text}")


MODES = {
    "regular": (dict(mode="regular"), ["--regular"]),
    "pair": ({}, []),
    "two [PRED]s": (dict(k=2), ["--predictors", "2"]),
    "standalone": (dict(views="standalone", k=1), ["--views", "standalone", "--predictors", "1"]),
    "step": (dict(mode="step", k=2), ["--step_jepa", "--predictors", "2"]),
    "step k=0": (dict(mode="step"), ["--step_jepa"]),
    "front": (dict(k=2, front=True), ["--predictors", "2", "--front_pred"]),
    "step front": (dict(mode="step", k=1, front=True), ["--step_jepa", "--predictors", "1", "--front_pred"]),
    "reverse": (dict(k=1, reverse=True), ["--predictors", "1", "--reverse_pred"]),
    "standalone reverse front": (dict(views="standalone", k=1, reverse=True, front=True), ["--predictors", "1", "--reverse_pred", "--front_pred", "--views", "standalone"]),
    "l2, train_all": (dict(distance="l2", k=1, train_all=True), ["--jepa_l2", "--predictors", "1", "--train_all"]),
    "mse, predictor": (dict(distance="mse"), ["--jepa_mse", "--linear_predictor", "--gamma", "0.5", "--lbd", "2"]),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind, flags", [("llama", ["--attn_implementation", "sdpa"]), ("qwen", ["--attn_implementation", "eager", "--batch_size", "3"]), ("neox", [])])
def test_step_equals_every_view_unpacked(models, questions, tmp_path, kind, mode, flags):
    options, own = MODES[mode]
    assert_same(make_trainer(models[kind], questions, tmp_path / "out", "--batch_size", "4", "--grad_accum", "4", *flags, *own), kind, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["pair", "two [PRED]s", "step"])
def test_lora_step_equals_every_view_unpacked(models, questions, tmp_path, kind, mode):
    """The adapters' second factor starts at zero, so one is made non-zero first."""
    options, own = MODES[mode]
    trainer = make_trainer(models[kind], questions, tmp_path / "out", "--lora", "--lora_rank", "4", *own)
    torch.manual_seed(0)
    for name, p in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    assert_same(trainer, kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_span_step_equals_whole_conversation_unpacked(models, questions, tmp_path, kind):
    trainer = make_trainer(models[kind], questions, tmp_path / "out", "--span", "--batch_size", "1", "--grad_accum", "8")
    order = [trainer.train_dataset[i] for i in range(8)]
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 8, torch.device("cpu"))
    trainer.part_steps = [0, 0]  # that was a look at the first step's batches: it doesn't count for the log
    spans = {}
    for (batch,) in batches:  # a micro-batch is one document at column 0, so that the views are its own places
        ids = batch["input_ids"].flatten().tolist()
        n = next(i for i, e in enumerate(order) if e.documents[0].trunk == ids[:len(e.documents[0].trunk)])
        spans[n] = batch["views"][:, 0].tolist()
    assert_same(trainer, kind, mode="span", span_of=spans)


def test_last_token_counts_from_the_end_of_the_turn(models, questions, tmp_path):
    """Llama's turn ends in <|eot_id|>: -1 is that one, -2 the last token of content, which is the default."""
    for name, flags in {"default": [], "-2": ["--last_token", "-2"]}.items():
        assert_same(make_trainer(models["llama"], questions, tmp_path / name, "--predictors", "1", *flags), "llama", k=1)
    for flags, k in (([], 0), (["--predictors", "2"], 2)):
        trainer = make_trainer(models["llama"], questions, tmp_path / f"-1{k}", "--last_token", "-1", *flags)
        example = trainer.train_dataset[0]
        (i, p), (j, q) = example.pairs[0]
        eot = trainer.processing_class.eos_token_id
        idx, *_ = jepa.write_rows([example.documents[i]], [(0, 0)], 1, len(example.documents[i]), 0)
        assert idx[0, p] == eot and example.documents[j].trunk[q] == eot
    with pytest.raises(ValueError, match="line 1: training.last_token=-400: a view has"):
        make_trainer(models["llama"], questions, tmp_path / "x", "--last_token", "-400")
    assert_same(make_trainer(models["llama"], questions, tmp_path / "step", "--step_jepa", "--predictors", "2", "--last_token", "-2"), "llama", mode="step", k=2)  # a step is no turn


def test_last_token_where_a_token_spans_the_text_s_end():
    """A plain-text template, whose line break merges with a question mark."""
    tokenizer = hf.make_tokenizer("neox", texts=["?\n"] * 9, vocab_size=260, split=False)
    talk = chat.Chat(tokenizer)
    turns = talk.conversation(None, "Why?", "so")
    text = [tokenizer.decode([t]) for t in turns.tokens]
    assert text[turns.user[-1]] == "?\n" and "".join(tokenizer.decode([t]) for t in turns.user_tail) == "Answer:"


@pytest.mark.parametrize("flags", [["--predictors", "1"], ["--step_jepa"], ["--span"], ["--regular"], ["--predictors", "2", "--front_pred", "--linear_predictor"]])
def test_1_x_8_equals_8_x_1(models, tmp_path, flags):
    """With uneven counts: some examples have no second step, answers differ in length."""
    data = hf.write_messages(tmp_path / "uneven.jsonl", [(s, u, a if n % 3 else "one step only" * n or "x") for n, (s, u, a) in enumerate(QUESTIONS)])
    steps = [one_step(make_trainer(models["llama"], data, tmp_path / size, "--batch_size", size, "--grad_accum", accum, *flags)) for size, accum in (("1", "8"), ("8", "1"))]
    (one, line), (other, same) = steps
    for key in {"loss", "ce_loss", "jepa_loss", "grad_norm"} & line.keys():
        assert line[key] == pytest.approx(same[key], rel=1e-4)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)
    assert "--regular" in flags or line["jepa_loss"] > 0.01


def test_memory_efficient_and_additive_mask_change_no_number(models, questions, tmp_path):
    gradients, line = one_step(make_trainer(models["qwen"], questions, tmp_path / "a", "--predictors", "1"))
    for name, flag in (("b", "--additive_mask"), ("c", "--memory_efficient"), ("d", "--gradient_checkpointing")):
        trainer = make_trainer(models["qwen"], questions, tmp_path / name, "--predictors", "1", flag)
        rows = [len(part["input_ids"].flatten()) for part in trainer.pack(trainer.train_dataset, True, None)]
        assert len(rows) == (8 if flag == "--memory_efficient" else 1)
        assert trainer.model.is_gradient_checkpointing == (flag in ("--memory_efficient", "--gradient_checkpointing"))
        again, same = one_step(trainer)
        assert same["loss"] == pytest.approx(line["loss"], rel=1e-5) and same["jepa_loss"] == pytest.approx(line["jepa_loss"], rel=1e-5)
        for n in gradients:
            torch.testing.assert_close(again[n], gradients[n], rtol=1e-3, atol=1e-5)


def test_memory_efficient_takes_less_memory(models, questions, tmp_path):
    def peak(*flags):
        trainer = make_trainer(models["qwen"], questions, tmp_path / "out", *flags)
        trainer.model.train()
        return bench.peak_memory(lambda: [sum(trainer.sums(trainer.model, part)).backward() for part in trainer.pack(trainer.train_dataset, True, None)], torch.device("cpu"), 0)
    assert peak("--max_items", "4", "--memory_efficient") < 0.7 * peak("--max_items", "4")


def test_infonce_is_among_the_micro_batch(models, questions, tmp_path):
    trainer = make_trainer(models["llama"], questions, tmp_path / "out", "--infonce", "--batch_size", "8", "--memory_efficient")
    (batch,), = [trainer.pack(trainer.train_dataset, True, None)]
    with torch.no_grad():
        _, u, v, _ = trainer.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], keep=torch.tensor([0]), views=batch["views"],
                                   attention_mask=finetune.attention_mask(trainer.model, batch["ends"], torch.float32))
    expected = F.cross_entropy(F.normalize(u, dim=-1) @ F.normalize(v, dim=-1).T / 0.07, torch.arange(8))
    assert one_step(trainer)[1]["jepa_loss"] == pytest.approx(expected.item(), rel=1e-4)


# ---- labels and layouts


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_labels_are_the_assistant_s_text_and_its_end_token(data):
    kind, plain = data.draw(st.sampled_from(KINDS)), data.draw(st.booleans())
    tokenizer = hf.make_tokenizer(kind)
    words = st.text(st.characters(codec="utf-8", exclude_characters="\ue000\ue001<|>"), min_size=1, max_size=12).filter(str.strip)
    system, user, assistant = data.draw(st.none() | words), data.draw(words), data.draw(words)
    if data.draw(st.booleans()):
        user = f"{user} {assistant}"  # the answer stands in the prompt
    talk = chat.Chat(tokenizer, plain)
    turns = talk.conversation(system, user, assistant)
    example, _ = layouts.lay_out(talk, finetune.Config(dataset=finetune.Data(train_file="x", plain=plain), training=finetune.Training(dtype="float32")), [], "pairs", system, [user, assistant])
    (trunk, *others), (((_, a), _),) = example.documents, example.pairs
    labels = tokenizer.decode([trunk.trunk[i] for i in trunk.loss_on])
    said = assistant if plain or kind != "llama" else assistant.strip()  # Llama's template trims
    assert labels == said + tokenizer.eos_token
    assert tokenizer.decode(turns.tokens[:turns.assistant[0]]) == tokenizer.decode(talk.prompt(system, user))
    content = tokenizer.decode(turns.tokens[:a + 1])
    assert content.rstrip().endswith(user.rstrip()) or content.endswith(user.strip())
    assert tokenizer.decode(others[0].trunk[1:]) == said
    if system and not (kind == "llama" and not plain):
        assert system in tokenizer.decode(trunk.trunk)


def test_answer_in_the_prompt_is_no_label(models, tmp_path):
    """Mistake 3: the answer's tokens are not searched."""
    data = hf.write_messages(tmp_path / "data.jsonl", [(None, "Say yes, yes, yes.", "yes")] * 2)
    trainer = make_trainer(models["llama"], data, tmp_path / "out", "--regular")
    (batch,), = [trainer.pack(trainer.train_dataset[:1], False, None)]
    assert trainer.processing_class.decode(batch["labels"][batch["labels"] >= 0]) == "yes<|eot_id|>"


def test_steps_are_found_in_the_text_and_keep_their_blank_line(models, tmp_path):
    talk = chat.Chat(hf.make_tokenizer("qwen"))
    for text, one, two in [("a b.\n\nc d.\n\n#### 3", "a b.\n\n", "c d.\n\n"), ("a\n \n\nb", "a\n \n\n", "b"), ("x\n\ny", "x\n\n", "y"), ("\n\nx\n\ny\n\n", "\n\nx\n\n", "y\n\n")]:
        turns = talk.conversation("A\n\nsystem", "a\n\nquestion", text)
        a, b = layouts.steps(talk, turns)
        assert talk.tokenizer.decode(a.tokens[a.first:]) == one and talk.tokenizer.decode(b.tokens[1:]) == two and a.document == 0
        assert turns.tokens[:len(a.tokens)] == a.tokens
    assert layouts.steps(talk, talk.conversation(None, "a\n\nb", "one step\nof two lines")) is None
    data = hf.write_messages(tmp_path / "data.jsonl", [(None, "q", "a\n\nb"), (None, "q", "only one")])
    said = []
    trainer = finetune.make_trainer(configure(models["qwen"], data, tmp_path / "out", "--step_jepa"), said.append)
    assert "1 without a JEPA term: fewer than two steps" in said[0] and [len(e.pairs) for e in trainer.train_dataset] == [1, 0]


def test_long_examples_are_cut_and_counted(models, tmp_path):
    long = "word " * 60
    data = hf.write_messages(tmp_path / "data.jsonl", [(None, "short", "short"), (None, "short", long), (None, long, "short")])
    said = []
    trainer = finetune.make_trainer(configure(models["llama"], data, tmp_path / "out", "--max_length", "48"), said.append)
    assert said[0].startswith(f"train: {data}: 2 examples") and "1 dropped: no label left by max_length" in said[0] and "1 without a JEPA term: a view is cut off by max_length" in said[0]
    assert "; 1 as long as max_length, or cut to it" in said[0]
    assert max(len(d.trunk) for e in trainer.train_dataset for d in e.documents) <= 48
    finetune.run(configure(models["llama"], data, tmp_path / "out", "--max_length", "48"), {})
    _, _, group = views_of(tmp_path / "out", read_jsonl(hf.write_messages(tmp_path / "other.jsonl", [(None, long, "x"), (None, "a", "b"), (None, "c", long), (None, "d", "e")])), 2)
    assert group.tolist() == [1, 3]


def test_paraphrases_each_predict_the_next(models, tmp_path):
    data = tmp_path / "groups.jsonl"
    data.write_text("\n".join(json.dumps({"paraphrases": texts}) for texts in (["a b", "c d e", "f"], ["x", "y"])))
    trainer = make_trainer(models["llama"], str(data), tmp_path / "out", "--plain", "--trainall", "--predictors", "1")
    first = trainer.train_dataset[0]
    assert len(first.documents) == 3 and len(first.pairs) == 2 and [len(d.branch) for d in first.documents] == [1, 1, 0]
    (batch,), = [trainer.pack(trainer.train_dataset, True, None)]
    assert (batch["labels"] >= 0).sum() == sum(len(d.trunk) - 1 for e in trainer.train_dataset for d in e.documents)
    with pytest.raises(ValueError, match="paraphrases have no user and assistant; give dataset.plain and train_all"):
        make_trainer(models["llama"], str(data), tmp_path / "out")


def test_the_end_of_the_turn_need_not_be_the_tokenizer_s_end_token(questions, tmp_path, models):
    """As in base models with a chat template: the turn's own end token is trained, and a saved model stops at it (mistake 2)."""
    tokenizer = hf.make_tokenizer("qwen", eos_token="<|endoftext|>")
    AutoModelForCausalLM.from_pretrained(models["qwen"]).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat.Chat(AutoTokenizer.from_pretrained(tmp_path / "base")).conversation(None, "a", "b").tokens[-1] == end
    finetune.run(configure(str(tmp_path / "base"), questions, tmp_path / "out", "--num_epochs", "1"), {})
    assert sorted(json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]) == sorted([end, tokenizer.eos_token_id])


def test_thinking_is_removed():
    assert chat.remove_thinking("<think>a\nb</think> yes <Output>4</Output><Thought>x</Thought>") == "yes 4"
    assert chat.remove_thinking("a < b and <i>c</i>") == "a < b and <i>c</i>"


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(["<think>", "</think>", "<Thought>", "</Thought>", "<Output>", "</Output>", "<Answer>", "<", "think>", "</", "\n", "a "]), max_size=12).map("".join))
def test_thinking_is_what_one_pattern_matches(text):
    assert chat.remove_thinking(text) == re.sub(r"<(think|Thought)>.*?</\1>|</?(?:Output|Answer)>", "", text, flags=re.DOTALL).strip()


@pytest.mark.parametrize("piece", ["<think>", "<Thought><think>", "<think></Thought>", "<think>x</think>", "<Output", "</Answer>"])
def test_thinking_of_a_hostile_text_is_removed_in_time(piece):
    """A megabyte: a pattern that searches behind every tag takes minutes."""
    began = time.perf_counter()
    chat.remove_thinking(piece * (1_000_000 // len(piece)))
    assert time.perf_counter() - began < 2


def test_templates_that_rewrite_are_refused():
    tokenizer = hf.make_tokenizer("qwen")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="rewrites a message's text"):
        chat.Chat(tokenizer)
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ValueError, match="doesn't write every message once and in order"):
        chat.Chat(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template; choose dataset.plain"):
        chat.Chat(tokenizer)


# ---- models


def test_models_whose_attention_a_mask_would_change_are_refused(models, questions, tmp_path):
    tokenizer, shape = hf.make_tokenizer("llama"), dict(vocab_size=320, hidden_size=32, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=32)
    mistral = MistralForCausalLM(MistralConfig(**shape, **heads, sliding_window=40))
    for name, model, message in [("mistral", mistral, "sliding window of 40 tokens"),
                                 ("mamba", MambaForCausalLM(MambaConfig(**shape, state_size=4)), "mamba has layers of linear_attention"),
                                 ("bloom", BloomForCausalLM(BloomConfig(**shape, n_head=4, initializer_range=0.3)), "bloom doesn't take rows with a mask")]:
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            make_trainer(str(tmp_path / name), questions, tmp_path / "out", "--max_length", "64", "--attn_implementation", "eager")
    make_trainer(str(tmp_path / "mistral"), questions, tmp_path / "out", "--max_length", "40")  # rows shorter than the window


def test_a_model_without_sdpa_is_taken_eager_and_the_template_s_prompt_is_compared(questions, tmp_path, models):
    tokenizer = hf.make_tokenizer("llama")
    config = Gemma2Config(vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=4096)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    tokenizer.save_pretrained(tmp_path / "gemma")
    assert one_step(make_trainer(str(tmp_path / "gemma"), questions, tmp_path / "out"))[1]["jepa_loss"] > 0
    for kind, differs in (("llama", False), ("qwen", False), ("neox", True)):  # neox: "Answer:", and " " before the text
        said = []
        finetune.make_trainer(configure(models[kind], questions, tmp_path / "out"), said.append)
        assert any("generation prompt" in line for line in said) == differs


def test_a_model_with_positions_of_its_own_is_found_by_its_numbers(models, questions, tmp_path, monkeypatch):
    """Such as one that counts positions through the row: here one made so."""
    real = finetune.AutoModelForCausalLM.from_pretrained
    def load(*args, **options):
        model = real(*args, **options)
        forward = model.model.forward
        model.model.forward = lambda *a, position_ids=None, **o: forward(*a, **o)
        return model
    monkeypatch.setattr(finetune.AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(ValueError, match="llama doesn't give a packed document the logits it has alone"):
        make_trainer(models["llama"], questions, tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lora", [[], ["--lora"]])
def test_pred_tokens_start_at_the_mean_are_trained_and_saved(questions, tmp_path, tied, lora):
    folder = hf.make_folder(tmp_path / "model", "llama", tie_word_embeddings=tied)
    before = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.detach()
    cfg = configure(folder, questions, tmp_path / "out", "--predictors", "2", "--learning_rate", "0.01", "--num_epochs", "2", "--lbd", "1", *lora)
    model, tokenizer, preds = finetune.load_model(cfg)
    table = model.get_input_embeddings()(torch.tensor(preds)).detach()
    torch.testing.assert_close(table, before.mean(0).expand(2, -1), rtol=1e-4, atol=1e-5)
    finetune.run(cfg, {})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(["<|predictor_1|>", "<|predictor_2|>"]) == preds and tokenizer.encode("a<|predictor_2|>b")[-2] == preds[1]
    after = saved.get_input_embeddings().weight.detach()
    assert len(after) >= len(tokenizer) and (after[preds] - table).abs().max() > 1e-3
    assert bool(lora) == torch.equal(after[:len(before)], before)


def test_linear_predictor_is_trained_and_saved(models, questions, tmp_path):
    for lora in ([], ["--lora"]):
        out = tmp_path / f"out{len(lora)}"
        finetune.run(configure(models["llama"], questions, out, "--linear_predictor", "--learning_rate", "0.01", *lora), {})
        from safetensors.torch import load_file
        weight = load_file(out / "jepa_predictor.safetensors")["weight"]
        assert 1e-3 < (weight - torch.eye(32)).abs().max() < 1
        assert not any("jepa" in name for name in load_file(out / "model.safetensors"))


def test_saved_models_generate_in_a_fresh_process(questions, tmp_path, models):
    for name, flags in {"full": ["--predictors", "1"], "lora": ["--lora", "--predictors", "1"], "scratch": ["--pretrain", "--linear_predictor"]}.items():
        finetune.run(configure(models["qwen"], questions, tmp_path / name, "--learning_rate", "1e-3", *flags), {})
        saved = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert AutoTokenizer.from_pretrained(tmp_path / name).convert_tokens_to_ids("<|im_end|>") in saved["eos_token_id"]
    code = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
for name in "full", "lora", "scratch":
    m, t = (kind.from_pretrained(f"{tmp_path}/{{name}}") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = t.apply_chat_template([{{"role": "user", "content": "What is 1 + 2?"}}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    print("generated", m.generate(**ids, max_new_tokens=5, do_sample=False).shape[1] > ids["input_ids"].shape[1])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("generated True") == 3, done.stderr


# ---- runs


def launch(*flags, processes=1, **options):
    command = [sys.executable, *(["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"] if processes > 1 else []), str(ROOT / "finetune.py")]
    return subprocess.Popen([*command, *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_killed_run_resumes_to_the_same_weights(models, questions, tmp_path):
    """Dropout of the adapters, dropped terms, spans and data order included."""
    flags = ["--span", "--lora", "--jepa_ratio", "0.5"]
    common = ["--model_name", models["llama"], "--train_file", questions, "--dtype", "float32", "--batch_size", "2", "--grad_accum", "1", "--num_epochs", "25",
              "--save_steps", "10", "--learning_rate", "1e-3", *flags]
    whole = launch(*common, "--output_dir", tmp_path / "whole")
    cut = launch(*common, "--output_dir", tmp_path / "cut")
    until = time.time() + 120
    while not (tmp_path / "cut" / "checkpoint-20" / "trainer_state.json").exists() and time.time() < until:
        time.sleep(0.01)
    cut.send_signal(signal.SIGKILL)
    cut.wait()
    assert whole.wait(timeout=120) == 0 and not (tmp_path / "cut" / "result.json").exists()
    refused = launch(*common, "--output_dir", tmp_path / "cut")
    assert "holds checkpoints; set training.resume: auto to continue" in refused.communicate(timeout=120)[0].splitlines()[-1]
    resumed = launch(*common, "--output_dir", tmp_path / "cut", "--resume", "auto")
    text = resumed.communicate(timeout=120)[0]
    assert resumed.returncode == 0, text
    assert text.strip().splitlines()[-1].startswith("result: {")
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    one, other = ([json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in ("whole", "cut"))
    assert [line.get("ce_loss") for line in one] == [line.get("ce_loss") for line in other]  # each step once
    one, other = (json.loads((tmp_path / n / "result.json").read_text()) for n in ("whole", "cut"))
    assert other["train_loss"] == one["train_loss"] and (one["resumed_from"], other["resumed_from"] >= 20) == (0, True)


def test_two_processes_train_as_one(models, questions, tmp_path):
    """Uneven labels and pairs a process; the same examples a step, so the same losses and weights."""
    common = ["--model_name", models["llama"], "--train_file", questions, "--eval_file", questions, "--dtype", "float32", "--num_epochs", "3", "--predictors", "1",
              "--learning_rate", "1e-3", "--linear_predictor", "--optimizer", "sgd", "--max_eval_items", "5"]
    runs = {1: launch(*common, "--output_dir", tmp_path / "1", "--batch_size", "4", "--grad_accum", "2"),
            2: launch(*common, "--output_dir", tmp_path / "2", "--batch_size", "4", "--grad_accum", "1", processes=2)}
    for run in runs.values():
        text = run.communicate(timeout=200)[0]
        assert run.returncode == 0, text
    one, two = (json.loads((tmp_path / str(n) / "result.json").read_text()) for n in runs)
    for key in ("train_loss", "ce_loss", "jepa_loss", "eval_loss", "eval_jepa_loss"):
        assert one[key] == pytest.approx(two[key], rel=1e-4)
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"} <= read_sealed(tmp_path / "2" / "checkpoint-3" / "sha256.json").keys()
    expected, found = weights(tmp_path / "1"), weights(tmp_path / "2")
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


def test_sharded_forward_and_backward_equal_the_whole_model(models, questions, tmp_path):
    """FSDP2 shards the model whose forward is tap_forward's; accelerate does so on CUDA alone, here by hand on two processes."""
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import copy, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import finetune, test_finetune as t
trainer = t.make_trainer({models['llama']!r}, {questions!r}, {str(tmp_path / 'out')!r}, "--predictors", "2", "--linear_predictor")
(batch,), = [trainer.pack(trainer.train_dataset, True, None)]
def loss():
    ce, term = trainer.sums(trainer.model, batch)
    return ce + term
loss().backward()
expected = {{name: p.grad.clone() for name, p in trainer.model.named_parameters()}}
trainer.model.zero_grad()
if not dist.is_initialized():
    dist.init_process_group("gloo")
for layer in trainer.model.model.layers:
    fully_shard(layer)
fully_shard(trainer.model)
loss().backward()
for name, p in trainer.model.named_parameters():
    torch.testing.assert_close(p.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-5)
print("sharded", type(p).__name__)
"""
    (tmp_path / "shard.py").write_text(code)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(tmp_path / "shard.py")],
                          capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and done.stdout.count("sharded") == done.stdout.count("DTensor") == 2, done.stderr


def test_evaluation_is_a_mean_over_labels_and_pairs(models, questions, tmp_path):
    trainer = make_trainer(models["llama"], questions, tmp_path / "out", "--eval_file", questions, "--predictors", "1", "--batch_size", "3")
    ce, term, _ = reference(trainer, "llama", QUESTIONS, k=1)
    Path(trainer.args.output_dir).mkdir(exist_ok=True)
    found = trainer.evaluate()  # before any training, too
    assert found["eval_loss"] == pytest.approx(ce, rel=1e-5) and found["eval_jepa_loss"] == pytest.approx(term, rel=1e-4)


def test_dropped_steps_cost_a_plain_step_and_are_no_zero_in_the_log(models, questions, tmp_path):
    """jepa_ratio works by itself (mistake 6): a dropped step has no branch and no lone view, and its losses are those of a regular run."""
    trainer = make_trainer(models["llama"], questions, tmp_path / "a", "--predictors", "1", "--jepa_ratio", "0.5", "--num_epochs", "20", "--batch_size", "4", "--grad_accum", "2", "--learning_rate", "0")
    Path(trainer.args.output_dir).mkdir(exist_ok=True)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "ce_loss" in line]
    kept = [jepa.keeps_term(42, n, 0.5) for n in range(20)]
    assert ["jepa_loss" in line for line in lines] == kept and 4 < sum(kept) < 16
    plain = trainer.pack(trainer.train_dataset, False, None)[0]
    assert plain["views"] is None and all(not d.branch and d.loss_on for e in trainer.train_dataset for d in e.without_term().documents)
    values = [line["jepa_loss"] for line in lines if "jepa_loss" in line]
    assert max(values) - min(values) < 1e-4  # learning rate 0, the whole set a step: the same value, not halved by dropped steps
    whole = make_trainer(models["llama"], questions, tmp_path / "b", "--predictors", "1", "--jepa_ratio", "1", "--batch_size", "4", "--grad_accum", "2")
    always = make_trainer(models["llama"], questions, tmp_path / "c", "--predictors", "1", "--batch_size", "4", "--grad_accum", "2")
    (one, _), (other, _) = one_step(whole), one_step(always)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_nothing_calls_cuda_on_a_cpu(models, questions, tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a machine without CUDA")
    def boom(*_, **__):
        raise AssertionError("a CUDA call")
    for name in ("synchronize", "max_memory_allocated", "memory_allocated", "empty_cache", "set_device", "current_device", "get_device_name", "get_device_properties", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, boom)
    finetune.run(configure(models["llama"], questions, tmp_path / "out", "--num_epochs", "1"), {})


# ---- settings


DOCUMENTED = {  # seeds/000's keys with the defaults of FIELD.md's table
    "general": dict(debug=0, finetune_seed=42, use_wandb=False, wandb_project="jepa-llm", wandb_run_name="", wandb_entity="", wandb_group="", wandb_tags="", wandb_mode="online"),
    "model": dict(name="meta-llama/Llama-3.2-1B-Instruct", use_lora=False, lora_rank=16, pretrain=False, cache_dir="", trust_remote_code=False),
    "dataset": dict(train_file="", eval_file="", data_file="", eval_split=0.2, split_seed=42, max_items=0, max_eval_items=0, config_name="", train_split="", max_length=512,
                    predictors=0, train_all=False, plain=False, remove_thinking=True, cache_dir="", tokenize_batch_size=1000),
    "training": dict(batch_size=4, grad_accum=4, learning_rate=2e-5, num_epochs=3, eval_steps=10, save_total_limit=2, logging_steps=1, lbd=0.1, gamma=1.0, regular=False,
                     track_flop=False, additive_mask=False, memory_efficient=False, dtype="bf16", jepa_ratio=-1.0, step_jepa=False, span=False, jepa_l2=False, jepa_mse=False,
                     infonce=False, front_pred=False, reverse_pred=False, same_flop=False, linear_predictor=False)}


def test_documented_keys_have_their_defaults():
    cfg, origin = load_sections(finetune.Config, [], finetune.ALIASES)
    for section, keys in DOCUMENTED.items():
        for key, value in keys.items():
            assert getattr(getattr(cfg, section), key) == value, key
            assert origin[f"{section}.{key}"] == "default"


def test_readme_table_is_the_config():
    rows = {}
    for line in (ROOT / "README.md").read_text().splitlines():
        if match := re.match(r"\| `([a-z_]+\.[a-z_0-9]+)` \| (.*?) \| (.*) \|$", line):
            rows[match[1]] = match[2], match[3]
    fields = {f"{s}.{f.name}": f for s, kind in finetune.Config.__annotations__.items() for f in kind.__dataclass_fields__.values()}
    assert rows.keys() == fields.keys()
    for key, f in fields.items():
        default = str(f.default).lower() if f.type is bool else str(f.default)
        assert rows[key] == (f"`{default}`" if default else "", f.metadata["doc"]), key
    assert all(f"`--{alias}` for `{key}`" in (ROOT / "README.md").read_text() for alias, key in finetune.ALIASES.items())


COMMANDS = [  # the example commands of seeds/003 and the options of seeds/001, after the script's name
    "--regular --lora", "--predictors 2 --lbd 0.5 --lora", "--step_jepa --predictors 2 --lbd 0.1 --lora",
    "--step_jepa --lbd 0.1 --gamma 1.0 --last_token -2 --lora --lora_rank 16 --finetune_seed 42", "--predictors 2 --lbd 0.5 --gamma 1.0 --last_token -2 --lora --finetune_seed 42",
    "--step_jepa --lbd 0.1 --jepa_l2 --lora", "--step_jepa --lbd 0.1 --jepa_mse --lora", "--step_jepa --lbd 0.1 --infonce --lora", "--step_jepa --lbd 0.5 --finetune_seed 82 --lora",
    "--additive_mask --lbd 2 --predictors 3 --seed 82", "--front_pred --predictors 1", "--reverse_pred", "--jepa_ratio 0.25 --same_flop", "--track_flop --debug 5", "--pretrain --plain --trainall"]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_replaced_scripts_run(models, questions, tmp_path, command, capsys):
    finetune.main(["--model_name", models["llama"], "--train_file", questions, "--output_dir", str(tmp_path / "out"), "--dtype", "float32", "--num_epochs", "1", "--logging_steps", "3", *command.split()])
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("result: {")


def test_yaml_then_flag_and_what_is_refused(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("general: {debug: true}\nmodel: {name: m, cache_dir: null}\ndataset: {train_file: a.jsonl}\ntraining: {lbd: 2, regular: false}\n")
    cfg, origin = load_sections(finetune.Config, ["--config", str(file), "--lbd", "3", "--dataset.cache_dir=c", "--lora"], finetune.ALIASES)
    assert (cfg.model.name, cfg.model.cache_dir, cfg.dataset.cache_dir, cfg.training.lbd, cfg.model.use_lora) == ("m", "", "c", 3.0, True)
    assert cfg.general.debug == 1 and load_sections(finetune.Config, ["--debug", "5"], finetune.ALIASES)[0].general.debug == 5
    assert origin["training.lbd"] == "flag --training.lbd" and origin["model.name"] == f"{file}: model.name" and origin["model.cache_dir"] == "default"
    for text, message in [("training: {ldb: 1}", r"run.yaml: unknown key training.ldb; did you mean training.lbd\?"), ("trainig: {lbd: 1}", "unknown section trainig; did you mean training"),
                          ("training: {lbd: often}", "run.yaml: training.lbd: 'often' is not a valid float"), ("training: 3", "section training must hold lines"),
                          ("training: {lbd: -1}", "training.lbd=-1.0: must be at least 0"), ("general: {wandb_tags: [a, b]}", "general.wandb_tags: .* is not a valid str"), ("[", "--config .*run.yaml: while parsing")]:
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_sections(finetune.Config, ["--config", str(file), "--train_file", "x"], finetune.ALIASES)
    for flags, message in [(["--cache_dir", "c"], "say --model.cache_dir or --dataset.cache_dir"), (["--preditors", "1"], r"unknown argument --preditors; did you mean predictors\?"),
                           (["--step_jepa", "--span"], "choose one of step_jepa, span"), (["--jepa_l2", "--infonce"], "choose one of jepa_l2, infonce"), (["--jepa_ratio", "0"], "jepa_ratio=0.0"),
                           (["--dtype", "int8"], "training.dtype=int8: must be bf16, fp16 or float32"),
                           (["--predictors", "11"], "dataset.predictors=11: must be at least 0 and at most 10"), (["--span", "--predictors", "1"], "training.span: its two vectors"),
                           (["--views", "both"], "dataset.views=both"), (["--wandb_mode", "x"], "general.wandb_mode=x")]:
        with pytest.raises(ValueError, match=message):
            load_sections(finetune.Config, ["--train_file", "x", *flags], finetune.ALIASES)


def test_misuse_ends_in_one_line(models, questions, tmp_path, capsys):
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"messages": [{"role": "system", "content": 5}, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}')
    bad = tmp_path / "bad.jsonl"
    bad.write_text(Path(questions).read_text() + '{"messages": [{"role": "user", "content": "x"}]}\n')
    single = hf.write_messages(tmp_path / "single.jsonl", [(None, "q", "one step")])
    nothing = hf.write_messages(tmp_path / "nothing.jsonl", [(None, "q", "<think>hm</think>")])
    out = tmp_path / "out"
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "result.json").write_text("{}")
    for model, data, folder, flags, message in [
            (models["llama"], str(bad), out, [], r"bad.jsonl, line 9: no message of role assistant"), (models["llama"], str(tmp_path / "none.jsonl"), out, [], "no such file, and no dataset"),
            (models["llama"], str(odd), out, [], "odd.jsonl, line 1: system is not a text"), (str(tmp_path), questions, out, [], "cannot be loaded"), (models["llama"], single, out, ["--step_jepa"], "no training example has a JEPA term"),
            (models["llama"], nothing, out, [], "nothing.jsonl, line 1: remove_thinking leaves nothing"), (models["llama"], questions, tmp_path / "finished", [], "holds a finished run"),
            (models["llama"], questions, out, ["--resume", str(tmp_path / "no")], "training.resume=.*no such folder"), (models["llama"], questions, out, ["--max_length", "12"], "no example has a label left"),
            (models["llama"], questions, out, ["--data_file", questions], "give either dataset.train_file or dataset.data_file"), (models["llama"], questions, out, ["--fsdp"], "training.fsdp: needs CUDA")]:
        with pytest.raises(SystemExit) as refused:
            finetune.main(["--model_name", model, "--train_file", data, "--output_dir", str(folder), "--dtype", "float32", *flags])
        assert re.match("error: [^\n]*" + message, str(refused.value)) and "\n" not in str(refused.value), refused.value


# What changes when a key does: (flags without it, flags with it, what to compare). Keys that other tests change are named there.
def outcome(models, questions, tmp_path, flags):
    """What a run prints, where it writes, what it trains: everything a key may change."""
    said = []
    trainer = finetune.make_trainer(configure(models["llama"], questions, tmp_path / "out", *flags), lambda line: said.append(re.sub(r"\S*/", "", line)))
    a = trainer.args
    return {"said": said, "documents": [(d.trunk, d.loss_on, d.branch) for e in trainer.train_dataset for d in e.documents], "evaluated": len(trainer.eval_dataset or []),
            "parameters": sorted((n, tuple(p.shape), p.requires_grad) for n, p in trainer.model.named_parameters()), "weights": sum(p.double().sum().item() for p in trainer.model.parameters()),
            "pairs": [e.pairs for e in trainer.train_dataset], "attention": trainer.model.config._attn_implementation, "distance": trainer.cfg.distance, "ratio": trainer.cfg.ratio,
            "run": (a.per_device_train_batch_size, a.gradient_accumulation_steps, a.learning_rate, a.num_train_epochs, a.eval_steps, a.save_steps, a.save_strategy, a.save_total_limit, a.logging_steps,
                    a.bf16, str(a.optim), a.seed, a.max_steps, a.report_to, a.run_name), "environment": {k: v for k, v in os.environ.items() if k.startswith("WANDB")},
            "checkpointing": trainer.model.is_gradient_checkpointing, "parts": len(trainer.pack(trainer.train_dataset, True, None)),
            "order": [len(x) for batch in trainer.get_train_dataloader() for x in [batch[0].documents[0]]]}


CHANGES = {"general.debug": "1", "general.finetune_seed": "7", "general.use_wandb": "true --general.wandb_mode offline", "model.use_lora": "true", "model.lora_rank": ("--lora", "4"), "model.pretrain": "true",
           "model.attn_implementation": "eager", "dataset.split_seed": ("DATA", "5"), "dataset.eval_split": ("DATA", "0.5"), "dataset.max_items": "3", "dataset.max_length": "40",
           "dataset.predictors": "2", "dataset.views": "standalone", "dataset.train_all": "true", "dataset.plain": "true", "dataset.eval_file": "QUESTIONS", "dataset.max_eval_items": ("DATA", "1"),
           "training.batch_size": "2", "training.grad_accum": "2", "training.learning_rate": "0.1", "training.num_epochs": "5", "training.eval_steps": "7", "training.save_steps": "3",
           "training.save_total_limit": "5", "training.logging_steps": "9", "training.last_token": "-1", "training.regular": "true", "training.step_jepa": "true", "training.span": "true",
           "training.front_pred": ("--predictors 1", "true"), "training.reverse_pred": "true", "training.linear_predictor": "true", "training.jepa_l2": "true", "training.jepa_mse": "true",
           "training.infonce": "true", "training.jepa_ratio": "0.5", "training.same_flop": "true", "training.additive_mask": "true", "training.memory_efficient": "true",
           "training.gradient_checkpointing": "true", "training.dtype": "bf16", "training.optimizer": "sgd",
           **{f"general.wandb_{name}": ("--use_wandb --wandb_mode offline", value) for name, value in dict(project="p", run_name="r", entity="e", group="g", tags="a,b").items()},
           "general.wandb_mode": ("--use_wandb", "disabled")}
ELSEWHERE = {"model.name", "dataset.train_file", "dataset.data_file", "training.output_dir", "training.resume"} | {
    "dataset.remove_thinking": 0, "training.lbd": 0, "training.gamma": 0, "training.track_flop": 0, "training.fsdp": 0, "model.trust_remote_code": 0, "model.cache_dir": 0,
    "dataset.cache_dir": 0, "dataset.config_name": 0, "dataset.train_split": 0, "dataset.preprocess_num_proc": 0, "dataset.tokenize_num_proc": 0, "dataset.tokenize_batch_size": 0}.keys()


@pytest.mark.parametrize("key", CHANGES)
def test_a_key_changes_the_run(models, questions, tmp_path, key, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    base, value = CHANGES[key] if isinstance(CHANGES[key], tuple) else ("", CHANGES[key])
    base = ["--train_file=", "--data_file", questions] if base == "DATA" else base.split()
    value = value.replace("QUESTIONS", questions).split()
    one = outcome(models, questions, tmp_path, base)
    monkeypatch.undo()
    other = outcome(models, questions, tmp_path, [*base, f"--{key}", *value])
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        os.environ.pop(name)
    assert one != other


def test_every_key_is_changed_by_some_test():
    keys = {f"{s}.{f}" for s, kind in finetune.Config.__annotations__.items() for f in kind.__dataclass_fields__}
    assert keys == CHANGES.keys() | ELSEWHERE


def test_keys_of_loading_reach_the_loaders(models, questions, tmp_path, monkeypatch):
    seen = {}
    def load_dataset(source, name, **options):
        seen.update(dataset=(source, name, options))
        return [json.loads(line) for line in Path(questions).read_text().splitlines()]
    monkeypatch.setattr(layouts, "load_dataset", load_dataset)
    for loader, of in (("model", finetune.AutoModelForCausalLM), ("tokenizer", finetune.AutoTokenizer)):
        monkeypatch.setattr(of, "from_pretrained", lambda name, loader=loader, real=of.from_pretrained, **options: seen.update({loader: options}) or real(name, **{k: v for k, v in options.items() if k not in ("cache_dir", "trust_remote_code")}))
    real_map, processes = layouts.Dataset.map, []
    monkeypatch.setattr(layouts.Dataset, "map", lambda self, f, **o: processes.append((o["num_proc"], o.get("batch_size"))) or real_map(self, f, **o))
    finetune.make_trainer(configure(models["llama"], "owner/name", tmp_path / "out", "--model.cache_dir", "mc", "--dataset.cache_dir", "dc", "--trust_remote_code", "--config_name", "main",
                                    "--train_split", "part", "--preprocess_num_proc", "2", "--tokenize_num_proc", "3", "--tokenize_batch_size", "2"), lambda line: None)
    assert seen["dataset"] == ("owner/name", "main", {"split": "part", "cache_dir": "dc"})
    layouts.read_records("owner/name", configure("m", "owner/name", "o", "--train_split", "part"), "test", 0)
    assert seen["dataset"][2]["split"] == "test"  # of eval_file
    bad = tmp_path / "late.jsonl"
    bad.write_text(Path(questions).read_text() + "no JSON")
    assert len(layouts.read_records(str(bad), configure("m", "x", "o"), "train", 3)) == 3
    assert seen["model"]["cache_dir"] == seen["tokenizer"]["cache_dir"] == "mc" and seen["model"]["trust_remote_code"] is True
    assert processes == [(2, None), (3, 2)]


def test_code_that_comes_with_a_model_is_run_only_when_asked(models, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "cache"), *sys.path])
    folder, ran = Path(shutil.copytree(models["llama"], tmp_path / "model")), tmp_path / "ran"
    (folder / "own.py").write_text(f"from pathlib import Path\nfrom transformers import LlamaConfig, LlamaForCausalLM\nPath({str(ran)!r}).touch()\n"
                                   "class OwnConfig(LlamaConfig):\n    model_type = 'own'\nclass OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    for main, flags in ((finetune.main, ["--model_name", str(folder), "--train_file", questions, "--output_dir", str(tmp_path / "out"), "--dtype", "float32"]),
                        (evaluate.main, ["--model", str(folder), "--data", questions, "--task", "exact", "--output", str(tmp_path / "out.jsonl")])):
        with pytest.raises(SystemExit, match="cannot be loaded .*contains custom code"):
            main(flags)
        assert not ran.exists()
    evaluate.open_model(str(folder), torch.float32, False, True)
    assert ran.exists()


def test_a_checkpoint_is_read_without_running_what_is_in_it(models, questions, tmp_path):
    """What a pickle would run stays undone in every file of the Trainer's that could be one."""
    flags = ["--num_epochs", "2", "--save_steps", "1", "--batch_size", "4", "--grad_accum", "2", "--regular"]
    ran, hostile = tmp_path / "ran", type("Hostile", (), {"__reduce__": lambda self: (Path.touch, (tmp_path / "ran",))})()
    finetune.run(configure(models["llama"], questions, tmp_path / "out", *flags), {})
    middle, found = tmp_path / "out" / "checkpoint-1", 0
    for name in sorted(p.name for p in middle.iterdir() if p.suffix in (".pt", ".pth", ".bin")):
        whole, found = (middle / name).read_bytes(), found + 1
        (tmp_path / "out" / "result.json").unlink(missing_ok=True)
        torch.save(hostile, middle / name)
        (middle / "sha256.json").unlink(missing_ok=True)  # or no file that has changed is opened at all
        with pytest.raises(ValueError, match="[Ww]eights.only") if name != "training_args.bin" else contextlib.nullcontext():  # that one isn't read at all
            finetune.run(configure(models["llama"], questions, tmp_path / "out", "--resume", str(middle), *flags), {})
        assert not ran.exists(), name
        (middle / name).write_bytes(whole)
    assert found >= 4
    torch.save(hostile, tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert ran.exists()  # it would have


# ---- damaged files


STEPS = ["--linear_predictor", "--predictors", "1", "--num_epochs", "2", "--batch_size", "4", "--grad_accum", "1", "--save_steps", "1", "--learning_rate", "1e-3"]


@pytest.fixture(scope="module")
def finished(models, questions, tmp_path_factory):
    """The output folder of a run of four steps, with a file of somebody else's in it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    finetune.run(configure(models["llama"], questions, out, *STEPS), {})
    return out


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy of it that may be continued from its third step."""
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / "result.json").unlink()
    return out


def refuse_mutations(file, read, count=25):
    """Change a file in many ways; each time read() must raise a ValueError of one line with its name."""
    content = file.read_bytes()

    @settings(max_examples=count, derandomize=True, deadline=None, database=None)
    @given(mutations(content))
    def refused(changed):
        file.write_bytes(changed)
        with pytest.raises(ValueError) as e:
            read()
        assert str(file) in str(e.value) and "\n" not in str(e.value), e.value
    try:
        refused()
        file.unlink()
        if file.name != "sha256.json":
            with pytest.raises(ValueError, match=re.escape(str(file))):
                read()
    finally:
        file.write_bytes(content)


def test_what_is_sealed_is_what_a_run_has_written(finished):
    names = {path.name for path in finished.iterdir()}
    assert {name for name in names if name.startswith("checkpoint")} == {"checkpoint-3", "checkpoint-4"} and "model.part" not in names
    sealed = read_sealed(finished / "sha256.json").keys()
    assert names - sealed == {"checkpoint-3", "checkpoint-4", "notes.txt", "metrics.jsonl", "result.json", "sha256.json"}
    assert {"model.safetensors", "jepa_predictor.safetensors", "config.yaml", "config.json", "tokenizer.json"} <= sealed
    for n in (3, 4):
        folder = finished / f"checkpoint-{n}"
        assert {path.name for path in folder.iterdir()} - read_sealed(folder / "sha256.json").keys() == {"sha256.json"}


def test_no_mutation_of_a_finished_model_is_silent(finished, questions, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    cfg = configure(str(out), questions, tmp_path / "next", "--linear_predictor")
    for name in [*read_sealed(out / "sha256.json"), "sha256.json"]:
        refuse_mutations(out / name, lambda: finetune.load_model(cfg))
        content = bytearray((out / name).read_bytes())
        content[len(content) // 2] ^= 1
        whole, _ = (out / name).read_bytes(), (out / name).write_bytes(content)
        for flags in (["--task", "exact"], ["--similarity"]):
            with pytest.raises(SystemExit, match="error: " + re.escape(str(out / name))):
                evaluate.main(["--model", str(out), "--data", questions, *flags])
        (out / name).write_bytes(whole)
    (out / "result.json").write_text("{}")  # what is not the model's may change
    (out / "predictions.jsonl").touch()
    assert finetune.load_model(cfg)[2] == [] and not list(out.glob("predictions-*"))


def test_no_mutation_of_a_checkpoint_is_silent(unfinished):
    """By name it is refused; with auto it is named, and the one before it is used."""
    newest, before, said = unfinished / "checkpoint-4", unfinished / "checkpoint-3", []
    auto = lambda: finetune.checkpoint(unfinished, "auto", said.append)
    assert auto() == str(newest) and finetune.checkpoint(unfinished, str(newest), said.append) == str(newest) and not said
    names = [*read_sealed(newest / "sha256.json"), "sha256.json"]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(names)

    def read(file):
        said.clear()
        assert auto() == str(before) and len(said) == 1 and said[0].startswith("warning: damaged checkpoint: ") and str(file) in said[0], said
        finetune.checkpoint(unfinished, str(newest), said.append)
    for name in names:
        refuse_mutations(newest / name, lambda: read(newest / name))
    for folder in (newest, before):
        (folder / "sha256.json").unlink()
    said.clear()
    with pytest.raises(ValueError, match="checkpoint-3: no sha256.json.*no checkpoint of this run is whole: remove"):
        auto()
    assert finetune.checkpoint(unfinished, str(newest), said.append) == str(newest) and "has no sha256.json" in said[-1] and len(said) == 3


def assert_same_run(one, other):
    (a, b), lines = map(weights, (one, other)), [[json.loads(line).get("ce_loss") for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, other)]
    assert all(torch.equal(a[name], b[name]) for name in a) and lines[0] == lines[1]
    for folder in (one, other):
        assert sorted(path.name for path in folder.glob("checkpoint*")) == ["checkpoint-3", "checkpoint-4"]
        for part in ("", "checkpoint-3", "checkpoint-4"):
            finetune.check_seal(folder / part)


def test_a_run_goes_on_from_the_last_whole_checkpoint(models, questions, finished, tmp_path, monkeypatch, capsys):
    """Killed while the third of four is written, of which one is kept; then with the newest damaged."""
    out, seal = tmp_path / "out", finetune.seal
    again = lambda *flags: finetune.run(configure(models["llama"], questions, out, *STEPS, *flags), {})

    def killed(folder):
        if folder.name == "checkpoint-3":
            raise KeyboardInterrupt
        seal(folder)
    monkeypatch.setattr(finetune, "seal", killed)
    with pytest.raises(KeyboardInterrupt):
        again("--save_total_limit", "1")
    assert sorted(path.name for path in out.glob("checkpoint*")) == ["checkpoint-2", "checkpoint.part"]
    monkeypatch.undo()
    with open(out / "metrics.jsonl", "a") as f:
        f.write('{"loss": 1.5, "st')
    assert again("--resume", "auto", "--save_total_limit", "2")["resumed_from"] == 2
    assert_same_run(out, finished)
    (out / "result.json").unlink()
    (out / "checkpoint-4" / "optimizer.pt").write_bytes(b"cut")
    capsys.readouterr()
    assert again("--resume", "auto")["resumed_from"] == 3
    assert re.search(r"^warning: damaged checkpoint: \S*checkpoint-4/optimizer.pt: its sha256", capsys.readouterr().out, re.M)
    assert_same_run(out, finished)


@pytest.mark.parametrize("name, change", [("model.safetensors", "cut"), ("jepa_predictor.safetensors", "cut"), ("tokenizer.json", '{"version": "9"}'), ("config.json", "cut"), ("optimizer.pt", "cut"),
                                          ("scheduler.pt", "cut"), ("rng_state.pth", "cut"), ("checkpoint-4/model.safetensors", "cut"), ("trainer_state.json", "cut"), ("trainer_state.json", None),
                                          ("trainer_state.json", '{"global_step": "4"}'), ("trainer_state.json", "[1]"), ("metrics.jsonl", '{"step": 1}\n{"stfp": 2}\n'), ("metrics.jsonl", '{"st\n')])
def test_a_damaged_file_without_a_seal_is_one_line(models, questions, unfinished, tmp_path, name, change):
    base = (unfinished / name).exists() and name not in ("metrics.jsonl", "checkpoint-4/model.safetensors")
    file = unfinished / name if (unfinished / name).exists() else unfinished / "checkpoint-4" / name
    content = file.read_bytes()
    file.unlink() if change is None else file.write_bytes(content[:len(content) // 2] if change == "cut" else change.encode())
    for seal in unfinished.rglob("sha256.json"):
        seal.unlink()
    out, flags = (tmp_path / "next", []) if base else (unfinished, ["--resume", str(unfinished / "checkpoint-4")])
    named = re.escape(str(file if name in ("trainer_state.json", "metrics.jsonl", "jepa_predictor.safetensors") else file.parent))
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{named}[^\n]*$"):
        finetune.main(["--model_name", str(unfinished) if base else models["llama"], "--train_file", questions, "--output_dir", str(out), "--dtype", "float32", *STEPS, "--num_epochs", "3", *flags])
    if name == "jepa_predictor.safetensors":
        with pytest.raises(SystemExit, match=f"^error: {named}[^\n]*$"):
            evaluate.main(["--model", str(unfinished), "--data", questions, "--similarity"])


def test_weights_of_the_loss_and_flops_are_printed(models, questions, tmp_path, capsys):
    lines = {name: one_step(make_trainer(models["llama"], questions, tmp_path / name, *flags))[1] for name, flags in {"a": [], "b": ["--lbd", "2"], "c": ["--gamma", "3"]}.items()}
    for name, gamma, lbd in (("a", 1, 0.1), ("b", 1, 2), ("c", 3, 0.1)):
        assert lines[name]["loss"] == pytest.approx(gamma * lines["a"]["ce_loss"] + lbd * lines["a"]["jepa_loss"], rel=1e-4)
    capsys.readouterr()
    trainer = make_trainer(models["llama"], questions, tmp_path / "d", "--track_flop", "--num_epochs", "12", "--batch_size", "2", "--grad_accum", "4")
    trainer.train()
    printed = re.findall(r"step (\d+): (\S+) FLOPs", capsys.readouterr().out)
    assert [int(n) for n, _ in printed] == list(range(1, 11))
    assert sum(float(flops) for _, flops in printed) / 10 == pytest.approx(trainer.state.total_flos / 12, rel=0.05)  # other examples side by side: other padding


@pytest.mark.parametrize("flags", [[], ["--lora"], ["--gradient_checkpointing"]])
def test_flops_are_those_of_torch_s_counter(models, questions, tmp_path, flags):
    """Which counts eager attention's products; it leaves out norms, and what nobody needs of the first layer's backward and the last one's second forward."""
    trainer = make_trainer(models["llama"], questions, tmp_path / "out", "--attn_implementation", "eager", *flags)
    batches = trainer.pack(trainer.train_dataset, True, None)
    trainer.model.train()
    with FlopCounterMode(display=False) as counter:
        sum(trainer.sums(trainer.model, batches[0])).backward()
    assert counter.get_total_flops() == pytest.approx(trainer.floating_point_ops(batches), rel=0.05)


def test_same_flop_makes_fewer_steps(models, questions, tmp_path):
    said = []
    trainer = finetune.make_trainer(configure(models["llama"], questions, tmp_path / "out", "--same_flop", "--num_epochs", "40", "--predictors", "1", "--views", "standalone"), said.append)
    cost = float(re.search(r"a step costs (\S+) of", said[-1]).group(1))
    assert 1.2 < cost < 3 and trainer.args.max_steps == int(40 / cost) and "instead of 40" in said[-1]
    half = []
    finetune.make_trainer(configure(models["llama"], questions, tmp_path / "out", "--same_flop", "--num_epochs", "40", "--predictors", "1", "--views", "standalone", "--jepa_ratio", "0.5"), half.append)
    assert float(re.search(r"a step costs (\S+) of", half[-1]).group(1)) == pytest.approx((1 + cost) / 2, abs=2e-3)


def test_the_views_of_a_saved_model_are_those_it_trained(models, questions, tmp_path):
    finetune.run(configure(models["qwen"], questions, tmp_path / "out", "--predictors", "1", "--learning_rate", "1e-3", "--lora"), {})
    u, v, group = views_of(tmp_path / "out", read_jsonl(questions), 3)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert group.tolist() == list(range(8))
    before, user, *_ = written("qwen", *QUESTIONS[4])
    ids = tokenizer.encode(before + user + "<|predictor_1|>", add_special_tokens=False)
    h = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
    torch.testing.assert_close(u[4], h.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("flags", [["--predictors", "1"], ["--step_jepa", "--predictors", "2"], ["--views", "standalone"], ["--jepa_mse", "--reverse_pred"]])
@pytest.mark.parametrize("length", [0, 160])
def test_bench_times_the_same_objective(models, questions, tmp_path, flags, length):
    trainer = make_trainer(models["llama"], questions, tmp_path / "out", *flags)
    (batch,), = [trainer.pack(trainer.train_dataset, True, None)]
    packed, padded = trainer.sums(trainer.model, batch), bench.padded_passes(trainer, trainer.train_dataset, length)
    for ours, theirs in zip(packed, padded):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)


def test_bench_of_finetuning_prints_its_table(models, questions, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--rounds", "2", "--finetune", "--model_name", models["llama"], "--train_file", questions, "--dtype", "float32", "--max_length", "256", "--predictors", "1"])
    bench.main()
    assert re.match(r"result: examples/s of packed over three passes padded to the longest \d+\.\d+x, to 256 \d+\.\dx; memory", capsys.readouterr().out.splitlines()[-1])
