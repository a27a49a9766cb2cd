"""Fine-tuning against a plain reference that runs every view by itself; and its runs.

The reference is written from the formulas, and from chat templates that are spelt out by hand.
"""

import contextlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import hf
from conftest import ROOT
from nanojepa.files import check_seal, read_sealed, seal_folder
from nanojepa.hf import export, model, run, settings
from nanojepa.hf.export import find_checkpoint
from nanojepa.hf.model import CausalLM
from nanojepa.hf.trainer import keep_precision
from nanojepa.objectives import OBJECTIVES, Objective
from nanojepa.objectives.distance import Views
from nanojepa.objectives.schedule import keeps_term
from nanojepa.records import read_examples
from nanojepa.settings import load_settings

QUESTIONS = hf.QUESTIONS[:8]
# What each family's template writes: before everything, before a text, and after it.
WRITTEN = {
    "llama": ("<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
    "qwen": ("", "<|im_start|>{}\n", "<|im_end|>\n"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: hf.make_folder(folder / kind, kind) for kind in hf.KINDS}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return hf.write_messages(tmp_path_factory.mktemp("data") / "questions.jsonl", QUESTIONS)


def silent(line):
    """A `say` that prints nothing."""


def flags_of(model_folder, data, out, *flags):
    """The command line of a run; each of the flags may hold several words."""
    names = ("--model_name", model_folder, "--train_file", data, "--output_dir", str(out))
    return [*names, "--dtype", "float32", *" ".join(flags).split()]


def configure(*arguments):
    return load_settings(settings.Config, flags_of(*arguments), aliases=settings.ALIASES).config


def make_trainer(*arguments, say=silent):
    """A trainer without dropout, which no reference could repeat."""
    trainer = run.make_trainer(configure(*arguments), say)
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return trainer


def train(*arguments):
    """A whole run; its result."""
    loaded = load_settings(settings.Config, flags_of(*arguments), aliases=settings.ALIASES)
    return run.run(loaded.config, loaded.origin)


class KeepGradients(TrainerCallback):
    """Keeps the gradients that the optimizer is about to use."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }


def one_step(trainer):
    """({name: gradient} of the step as the Trainer makes it, its line of losses)."""
    keep = KeepGradients()
    trainer.add_callback(keep)
    trainer.args.max_grad_norm, trainer.args.max_steps = 0, 1
    trainer.args.save_strategy = "no"
    trainer.train()
    return keep.gradients, losses(trainer)[0]


def losses(trainer):
    """The log lines of training losses."""
    return [line for line in trainer.state.log_history if "ce_loss" in line]


def close(found, expected, rtol=1e-3, atol=1e-5):
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, rtol=rtol, atol=atol)


# ---- the plain reference


def write(kind, system, user, assistant):
    """(text before the user's, the user's, text between, the assistant's, the end token)."""
    if kind == "neox":  # it has no system role, so that message is merged into the user's
        user = f"{system}\n\n{user}" if system else user
        return "Question: ", user, "\nAnswer:", " " + assistant, "<|endoftext|>"
    begin, header, close = WRITTEN[kind]
    if system:
        begin += header.format("system") + system + close
    before, between = begin + header.format("user"), close + header.format("assistant")
    return before, user, between, assistant, close.strip()


def write_alone(kind, role):
    """The text before a message in a conversation of its own."""
    if kind == "neox":
        return {"user": "Question: ", "assistant": ""}[role]
    begin, header, _ = WRITTEN[kind]
    return begin + header.format(role)


class Reference:
    """The losses of a trainer's settings, with one forward pass for each view."""

    def __init__(self, trainer, kind):
        self.cfg, self.model, self.kind = trainer.cfg, trainer.model, kind
        self.tokenizer = trainer.processing_class
        names = [f"<|predictor_{n + 1}|>" for n in range(self.cfg.dataset.predictors)]
        self.preds = self.encode("".join(names))
        assert len(self.preds) == len(names)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def run(self, ids):
        """(states after the last norm, logits) of one sequence."""
        ids = torch.tensor([ids])
        out = self.model(input_ids=ids, output_hidden_states=True, use_cache=False)
        return out.hidden_states[-1][0], out.logits[0]

    def sides(self, record):
        """[(tokens before a view's text, tokens of its text)] of view A and of view B."""
        before, user, between, answer, _ = write(self.kind, *record)
        start = self.tokenizer.bos_token_id
        alone = [self.tokenizer.eos_token_id if start is None else start]
        if self.cfg.training.step_jepa:
            one, two, *_ = answer.split("\n\n")
            context = self.encode(before + user + between)
            a, b = (context, self.encode(one + "\n\n")), (alone, self.encode(two + "\n\n"))
            return [self.begin_after_blank(*a), b]
        if self.cfg.dataset.views == "prefix":
            _, text = self.begin_after_blank([], self.encode(answer))
            return [(self.encode(before), self.encode(user)), (alone, text)]
        user = self.encode(write_alone(self.kind, "user")), self.encode(record[1])
        lead = self.encode(write_alone(self.kind, "assistant"))
        return [user, self.begin_after_blank(lead, self.encode(answer))]

    def begin_after_blank(self, lead, text):
        """A view's lead and text: a blank that the template writes before it is none of it.

        If one token holds both, it belongs to the text.
        """
        if self.tokenizer.decode(text[:1]) == " ":
            return [*lead, text[0]], text[1:]
        return lead, text

    def views(self, record):
        """The two states of a pair."""
        t, states = self.cfg.training, []
        for side, (lead, text) in enumerate(self.sides(record)):
            preds = self.preds if side == (1 if t.reverse_pred else 0) else []
            ids = [*lead, *preds, *text] if t.front_pred else [*lead, *text, *preds]
            states.append(self.run(ids)[0][-1])
        u, v = reversed(states) if t.reverse_pred else states
        objective = self.model.jepa_objective
        return (u if objective.predictor is None else objective.predictor(u)), v

    def distance(self, u, v):
        if self.cfg.distance == "l2":
            return (u - v).norm()
        if self.cfg.distance == "mse":
            return ((u - v) ** 2).mean()
        return 1 - (u @ v) / (u.norm() * v.norm())

    def losses(self, spans=None):
        """(CE, term, {name: gradient}); spans: (a, b, start, end) of each record."""
        t, ce, labels, terms = self.cfg.training, 0, 0, []
        for n, record in enumerate(QUESTIONS):
            before, user, between, answer, end = write(self.kind, *record)
            prompt, reply = self.encode(before + user + between), self.encode(answer)
            whole = prompt + reply + self.encode(end)
            h, logits = self.run(whole)
            first = 1 if self.cfg.dataset.train_all else len(prompt)
            targets = torch.tensor(whole[first:])
            ce = ce + F.cross_entropy(logits[first - 1 : -1], targets, reduction="sum")
            labels += len(targets)
            if spans:
                a, b, s, e = spans[n]
                assert (s, e) == (len(self.encode(before)), len(prompt) + len(reply) - 1)
                assert s < a <= b <= e
                terms.append(((h[a - 1] - h[s]) + (h[e] - h[b]), h[b] - h[a - 1]))
            elif not t.regular:
                terms.append(self.views(record))
        ce = ce / labels
        term = sum((self.distance(u, v) / len(terms) for u, v in terms), torch.tensor(0.0))
        loss = t.gamma * ce + t.lbd * term
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, named.values(), allow_unused=True)
        return ce.item(), term.item(), dict(zip(named, gradients, strict=True))


def assert_same(trainer, kind, spans=None):
    ce, term, expected = Reference(trainer, kind).losses(spans)
    gradients, line = one_step(trainer)
    assert line["ce_loss"] == pytest.approx(ce, rel=1e-5)
    if term:  # of order 1, from cosines in float32
        assert line["jepa_loss"] == pytest.approx(term, rel=1e-4)
    # Sums of float32 in another order: 1e-7 of the largest, times the width of a sum.
    scale = max(g.abs().max().item() for g in expected.values() if g is not None)
    unused = [name for name, g in expected.items() if g is None]
    assert not any(gradients[name].any() for name in unused if name in gradients)
    close(gradients, {n: g for n, g in expected.items() if g is not None}, atol=2e-5 * scale)


MODES = {
    "regular": "--regular",
    "pair": "",
    "two [PRED]s": "--predictors 2",
    "prefix": "--views prefix --predictors 1",
    "step": "--step_jepa --predictors 2",
    "step k=0": "--step_jepa",
    "front": "--predictors 2 --front_pred",
    "step front": "--step_jepa --predictors 1 --front_pred",
    "prefix reverse front": "--views prefix --predictors 1 --reverse_pred --front_pred",
    "reverse": "--predictors 1 --reverse_pred",
    "l2, train_all": "--jepa_l2 --predictors 1 --train_all",
    "mse, predictor": "--jepa_mse --linear_predictor --gamma 0.5 --lbd 2",
}
SOME = ("two [PRED]s", "prefix", "step front", "reverse")
CASES = [("llama", mode, "--attn_implementation sdpa") for mode in MODES]
CASES += [("qwen", mode, "--attn_implementation eager --batch_size 3") for mode in SOME]
CASES += [("neox", mode, "") for mode in SOME]


@pytest.mark.parametrize("kind, mode, flags", CASES)
def test_step_equals_every_view_unpacked(models, questions, tmp_path, kind, mode, flags):
    trainer = make_trainer(models[kind], questions, tmp_path / "out", flags, MODES[mode])
    assert_same(trainer, kind)


@pytest.mark.parametrize("kind, mode", [("llama", "prefix"), ("qwen", "step"), ("neox", "pair")])
def test_lora_step_equals_every_view_unpacked(models, questions, tmp_path, kind, mode):
    flags = "--lora --lora_rank 4 --linear_predictor"
    trainer = make_trainer(models[kind], questions, tmp_path / "out", flags, MODES[mode])
    torch.manual_seed(0)
    for name, p in trainer.model.named_parameters():
        if "lora_B" in name:  # it starts at zero, which would hide the adapters
            torch.nn.init.normal_(p, std=0.3)
    assert_same(trainer, kind)


def test_span_step_equals_whole_conversation_unpacked(models, questions, tmp_path):
    flags = "--span --batch_size 1 --grad_accum 8"
    trainer = make_trainer(models["llama"], questions, tmp_path / "out", flags)
    trunks = [example.documents[0].trunk for example in trainer.train_dataset]
    (*_, batches), _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 8, None)
    trainer.start_log_line()  # that was a look at the first step, which isn't to be logged
    spans = {}
    for batch in batches:
        ids, document = batch.idx.flatten().tolist(), batch.document.flatten()
        for places in batch.drawn["places"].flatten(1).T.tolist():
            first = int((document == document[places[2]]).nonzero()[0])
            n = next(n for n, t in enumerate(trunks) if t == ids[first : first + len(t)])
            before, b, start, end = (place - first for place in places)
            spans[n] = before + 1, b, start, end
    assert_same(trainer, "llama", spans)


def test_mtp_scores_the_labels_that_follow_the_next(models, questions, tmp_path):
    """Each conversation alone, token by token: CE(t+2) + CE(t+3) / 2 over trained tokens."""
    trainer = make_trainer(models["llama"], questions, tmp_path / "out", "--objective mtp")
    trainer.model.eval()
    total, count = 0.0, 0
    for example in trainer.train_dataset:
        (document,) = example.documents
        tokens = torch.tensor(document.trunk)
        log_p = trainer.model(input_ids=tokens[None]).logits[0].log_softmax(-1)
        for target in document.loss_on:
            if target >= 2:
                total, count = total - log_p[target - 2, tokens[target]], count + 1
            if target >= 3:
                total = total - log_p[target - 3, tokens[target]] / 2
    batch = hf.one_batch(trainer, trainer.train_dataset)
    term = trainer.sums(trainer.model, batch).term
    assert batch.drawn["weight"].sum() == count > 50
    assert (term / count).item() == pytest.approx((total / count).item(), rel=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        "--predictors 1",
        "--step_jepa",
        "--span",
        "--objective mtp",
        "--objective future",
        "--objective masked",
        "--objective next",
        "--objective masked_ce",
        "--objective masked,mtp:0.5",
        "--regular",
        "--predictors 2 --front_pred --linear_predictor",
    ],
)
def test_1_x_8_equals_8_x_1(models, tmp_path, flags):
    """With uneven counts: some examples have no second step, and answers differ in length."""
    uneven = [
        (s, u, a if n % 3 else "one step only" * n or "x") for n, (s, u, a) in enumerate(QUESTIONS)
    ]
    data = hf.write_messages(tmp_path / "uneven.jsonl", uneven)
    steps = []
    for shape in ("--batch_size 1 --grad_accum 8", "--batch_size 8 --grad_accum 1"):
        steps.append(one_step(make_trainer(models["llama"], data, tmp_path / "out", shape, flags)))
    (one, line), (other, same) = steps
    for key in {"loss", "ce_loss", "jepa_loss", "grad_norm"} & line.keys():
        assert line[key] == pytest.approx(same[key], rel=1e-4)
    close(other, one)
    assert "regular" in flags or line["jepa_loss"] > 0.01


def test_memory_efficient_and_additive_mask_change_no_number(models, questions, tmp_path):
    plain = make_trainer(models["qwen"], questions, tmp_path / "a", "--predictors 1")
    gradients, line = one_step(plain)
    for flag in ("--additive_mask", "--memory_efficient", "--gradient_checkpointing"):
        trainer = make_trainer(models["qwen"], questions, tmp_path / "b", "--predictors 1", flag)
        assert trainer.model.is_gradient_checkpointing == (flag != "--additive_mask")
        again, same = one_step(trainer)
        for name in ("loss", "jepa_loss"):
            assert same[name] == pytest.approx(line[name], rel=1e-5)
        close(again, gradients)


def test_the_tokens_of_a_pass_change_no_number(models, questions, tmp_path):
    """More passes of fewer rows: the same step."""
    steps, passes = [], []
    for tokens in (64, 1200, 10_000):
        flags = f"--predictors 1 --batch_size 2 --grad_accum 4 --micro_batch_tokens {tokens}"
        trainer = make_trainer(models["llama"], questions, tmp_path / "out", flags)
        loader = iter(trainer.get_train_dataloader())
        (*empty, batches), _ = trainer.get_batch_samples(loader, 4, "cpu")
        assert empty == [[]] * 3 and len({batch.idx.shape for batch in batches}) == 1
        assert batches[0].idx.numel() <= max(
            tokens, 2 * trainer.packer.row_length
        )  # an example's rows
        passes.append(len(batches))
        trainer = make_trainer(models["llama"], questions, tmp_path / "out", flags)
        steps.append(one_step(trainer))
    assert passes[0] > passes[1] > passes[2] == 1, passes
    for gradients, line in steps[1:]:
        for name in ("loss", "ce_loss", "jepa_loss", "grad_norm"):
            assert line[name] == pytest.approx(steps[0][1][name], rel=1e-4)
        close(gradients, steps[0][0])


BFLOAT16 = "--weights bfloat16 --optimizer adamw_torch_8bit --dtype bf16"


def test_bfloat16_weights_have_the_gradients_of_float32_ones_but_for_rounding(
    models, questions, tmp_path
):
    results = []
    for flags in ("", BFLOAT16):
        trainer = make_trainer(models["llama"], questions, tmp_path / "out", flags)
        sums = trainer.sums(trainer.model, hf.one_batch(trainer, trainer.train_dataset))
        sum(sums).backward()
        gradients = {n: p.grad.flatten() for n, p in trainer.model.named_parameters()}
        results.append((torch.stack(sums), gradients))
    (x, exact), (y, rounded) = results
    torch.testing.assert_close(y, x, rtol=0.02, atol=0)  # bfloat16 has three digits
    for name, gradient in exact.items():
        assert rounded[name].dtype == torch.bfloat16
        assert F.cosine_similarity(rounded[name].float(), gradient, dim=0) > 0.95
    assert trainer.args.optim_args == "bf16_stochastic_round=True"


@pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="needs torchao")
def test_bfloat16_weights_are_trained_and_saved(models, questions, tmp_path):
    flags = f"{BFLOAT16} --learning_rate 1e-3"
    first, last = (
        train(models["llama"], questions, tmp_path / name, f"{flags} --num_epochs {epochs}")
        for name, epochs in (("a", 1), ("b", 8))
    )
    assert last["ce_loss"] < first["ce_loss"]
    saved = load_file(tmp_path / "b" / "model.safetensors")
    assert {w.dtype for w in saved.values()} == {torch.bfloat16}


def test_few_shapes(models, tmp_path):
    """At most four in 500 passes, with lengths that differ by a factor of ten."""
    rng = random.Random(0)
    words = [" ".join(["word"] * rng.randint(4, 40)) for _ in range(2000)]
    data = hf.write_messages(tmp_path / "many.jsonl", [(None, w, w[::-1]) for w in words])
    flags = "--num_epochs 5 --micro_batch_tokens 1024"
    trainer = make_trainer(models["llama"], data, tmp_path / "out", flags)
    shapes, passes, filled, padding = set(), 0, 0, 0
    for _ in range(5):
        loader = iter(trainer.get_train_dataloader())
        for _ in range(2000 // 16):
            (*_, batches), _ = trainer.get_batch_samples(loader, 4, "cpu")
            shapes |= {batch.idx.shape for batch in batches}
            passes += len(batches)
            padding += sum(int((batch.document < 0).sum()) for batch in batches)
            filled += sum(batch.idx.numel() for batch in batches)
    assert passes >= 500 and len(shapes) <= 4 and padding < 0.15 * filled


def test_memory_efficient_keeps_less(models, questions, tmp_path):
    """Bytes that the forward pass of the largest micro-batch keeps for the backward pass."""

    def kept(flags=""):
        flags += " --batch_size 8"
        trainer = make_trainer(models["qwen"], questions, tmp_path / "out", flags)
        trainer.model.train()
        sizes = []
        for examples in trainer.get_train_dataloader():
            found = []
            batch, *_ = trainer.packer.split([examples], [0], True, 0, len(examples))
            with saved_tensors_hooks(
                lambda x, found=found: found.append(x.nbytes) or x, lambda x: x
            ):
                trainer.sums(trainer.model, batch)
            sizes.append(sum(found))
        return max(sizes)

    assert kept("--memory_efficient") < 0.3 * kept("--gradient_checkpointing") < 0.3 * kept()


def test_infonce_is_among_the_micro_batch(models, questions, tmp_path):
    """With memory_efficient too: its micro-batches stay whole."""
    flags = "--infonce --batch_size 8 --memory_efficient"
    trainer = make_trainer(models["llama"], questions, tmp_path / "out", flags)
    batch = hf.one_batch(trainer, trainer.train_dataset)
    lm = CausalLM(trainer.model)
    with torch.no_grad():
        states = lm.states(batch.idx, batch.positions, batch.ends).flatten(0, 1)
    u, v = (F.normalize(states[places], dim=-1) for places in batch.pairs)
    expected = F.cross_entropy(u @ v.T / 0.07, torch.arange(8))
    assert one_step(trainer)[1]["jepa_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_the_facade_has_the_model_s_own_states_and_logits(tmp_path):
    """Of a model that scales its embeddings and caps its logits."""
    config = transformers.Gemma2Config(**GEMMA, final_logit_softcapping=0.5)
    network = transformers.Gemma2ForCausalLM(config).eval()
    lm, idx = CausalLM(network), torch.arange(24).view(2, 12)
    with torch.no_grad():
        out = network(idx, output_hidden_states=True)
        states = lm.states(idx)
        assert torch.equal(states, out.hidden_states[-1])
        torch.testing.assert_close(lm.logits(states), out.logits, rtol=1e-5, atol=1e-6)
        assert lm.logits(states).abs().max() < 0.5
        assert lm.embed(idx).shape == states.shape


# ---- an objective that the trainer has never heard of


class Neighbours(Objective):
    """Pulls the state of each label towards that of the token before it."""

    def draw(self, batch, rng):
        return {"weight": (batch.targets[:, :-1] >= 0).float()}

    def views(self, lm, batch, states, drawn):
        h = self.compared(states)
        return Views(h[:, 1:], h[:, :-1])


TOY = "--objective toy --linear_predictor --lbd 2 --optimizer sgd --learning_rate 1e-2"
TOY += " --num_epochs 3"


def test_a_new_objective_needs_only_its_line_in_the_table(models, questions, tmp_path, monkeypatch):
    """With accumulation as without, and against the formula."""
    monkeypatch.setitem(OBJECTIVES, "toy", Neighbours)
    trainer = make_trainer(models["llama"], questions, tmp_path / "a", TOY)
    ce, labels, distances = 0, 0, []
    for example in trainer.train_dataset:
        (document,) = example.documents
        h, logits = Reference(trainer, "llama").run(document.trunk)
        cosines = F.cosine_similarity(h[1:], h[:-1], dim=-1)
        distances += [1 - cosines[t - 1].item() for t in document.loss_on]
        targets = torch.tensor(document.trunk)[list(document.loss_on)]
        ce += F.cross_entropy(logits[document.loss_on[0] - 1 : -1], targets, reduction="sum").item()
        labels += len(targets)
    result = train(models["llama"], questions, tmp_path / "b", TOY, "--grad_accum 2")
    curve = read_losses(tmp_path / "b")
    expected = torch.tensor([ce / labels, sum(distances) / len(distances)])
    torch.testing.assert_close(curve[0], expected, rtol=1e-4, atol=0)
    assert result["jepa_loss"] == pytest.approx(curve[-1, 1].item())
    assert curve[-1, 1] < curve[0, 1]
    train(models["llama"], questions, tmp_path / "c", TOY, "--batch_size 8 --grad_accum 1")
    torch.testing.assert_close(read_losses(tmp_path / "c"), curve, rtol=1e-4, atol=0)
    saved = load_file(tmp_path / "b" / model.OBJECTIVE_FILE)["predictor.weight"]
    assert not torch.equal(saved, torch.eye(32))


def read_losses(folder):
    """CE and term, (steps, 2), of a run's metrics.jsonl; NaN where a step had no term."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    kept = [line for line in lines if "ce_loss" in line]
    return torch.tensor([[line["ce_loss"], line.get("jepa_loss", torch.nan)] for line in kept])


@pytest.mark.slow
def test_a_new_objective_trains_on_two_processes_as_on_one(models, questions, tmp_path):
    code = "from test_finetune import OBJECTIVES, Neighbours, run\n"
    (tmp_path / "toy.py").write_text(code + 'OBJECTIVES["toy"] = Neighbours\nrun.main()\n')
    for processes, accum in ((1, "--grad_accum 2"), (2, "--grad_accum 1")):
        flags = flags_of(models["llama"], questions, tmp_path / str(processes), TOY, accum)
        finish(launch(*flags, processes=processes, script=tmp_path / "toy.py"))
    one, two = (read_losses(tmp_path / str(n)) for n in (1, 2))
    assert len(one) == 3
    torch.testing.assert_close(two, one, rtol=1e-4, atol=0)


# ---- models

GEMMA = dict(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


def save_network(folder, network, kind="llama"):
    network.save_pretrained(folder)
    hf.make_tokenizer(kind).save_pretrained(folder)
    return str(folder)


def test_models_whose_attention_a_mask_would_change_are_refused(questions, tmp_path):
    shape = dict(vocab_size=320, hidden_size=32, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=32)
    local = transformers.LlamaConfig(**shape, **heads, local_attention_size=40)
    bloom = transformers.BloomConfig(**shape, n_head=4, initializer_range=0.3)
    mamba = transformers.MambaConfig(**shape, state_size=4)
    for name, network, message in [
        ("llama", transformers.LlamaForCausalLM(local), "local_attention_size=40"),
        ("mamba", transformers.MambaForCausalLM(mamba), "mamba has layers of linear_attention"),
        ("bloom", transformers.BloomForCausalLM(bloom), "bloom doesn't"),
    ]:
        folder = save_network(tmp_path / name, network)
        flags = "--max_length 64 --attn_implementation eager"
        with pytest.raises(ValueError, match=message):
            make_trainer(folder, questions, tmp_path / "out", flags)


def test_a_model_without_sdpa_is_taken_eager(questions, tmp_path):
    network = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GEMMA))
    folder = save_network(tmp_path / "gemma", network)
    trainer = make_trainer(folder, questions, tmp_path / "out")
    assert trainer.model.config._attn_implementation == "eager"
    assert one_step(trainer)[1]["jepa_loss"] > 0


def test_a_model_with_positions_of_its_own_is_found_by_its_numbers(
    models, questions, tmp_path, monkeypatch
):
    """Such as one that counts positions through the row: here one made so."""
    real = AutoModelForCausalLM.from_pretrained

    def load(*args, **options):
        network = real(*args, **options)
        forward = network.model.forward
        network.model.forward = lambda *a, position_ids=None, **o: forward(*a, **o)
        return network

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    with pytest.raises(ValueError, match="llama doesn't give a packed document the logits it has"):
        make_trainer(models["llama"], questions, tmp_path / "out")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lora", ["", "--lora"])
def test_pred_tokens_start_at_the_mean_are_trained_and_saved(questions, tmp_path, tied, lora):
    folder = hf.make_folder(tmp_path / "model", "llama", tie_word_embeddings=tied)
    before = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.detach()
    flags = "--predictors 2 --learning_rate 0.01 --num_epochs 2 --lbd 1"
    cfg = configure(folder, questions, tmp_path / "out", flags, lora)
    base = model.read_base(cfg)
    network, tokenizer = model.load_model(cfg, base, None), base.tokenizer
    preds = tokenizer.convert_tokens_to_ids(["<|predictor_1|>", "<|predictor_2|>"])
    table = network.get_input_embeddings()(torch.tensor(preds)).detach()
    torch.testing.assert_close(table, before.mean(0).expand(2, -1), rtol=1e-4, atol=1e-5)
    run.run(cfg, defaultdict(str))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.encode("a<|predictor_2|>b")[-2] == preds[1]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    after = saved.get_input_embeddings().weight.detach()
    assert len(after) >= len(tokenizer) and (after[preds] - table).abs().max() > 1e-3
    assert bool(lora) == torch.equal(after[: len(before)], before)


@pytest.mark.parametrize("lora", ["", "--lora"])
def test_linear_predictor_is_trained_saved_and_loaded(models, questions, tmp_path, lora):
    out = tmp_path / "out"
    train(models["llama"], questions, out, "--linear_predictor --learning_rate 0.01", lora)
    weight = load_file(out / model.OBJECTIVE_FILE)["predictor.weight"]
    assert 1e-3 < (weight - torch.eye(32)).abs().max() < 1
    assert not any("jepa" in name for name in load_file(out / "model.safetensors"))
    again = make_trainer(str(out), questions, tmp_path / "next", "--linear_predictor")
    assert torch.equal(again.objective.predictor.weight.detach(), weight)


@pytest.mark.slow
def test_saved_models_generate_in_a_fresh_process(questions, tmp_path, models):
    for name, flags in {
        "full": "--predictors 1",
        "lora": "--lora --predictors 1",
        "scratch": "--pretrain --linear_predictor",
    }.items():
        train(models["qwen"], questions, tmp_path / name, "--learning_rate 1e-3", flags)
        saved = json.loads((tmp_path / name / "generation_config.json").read_text())
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer.convert_tokens_to_ids("<|im_end|>") in saved["eos_token_id"]
    code = f"""
from transformers import AutoModelForCausalLM, AutoTokenizer
question = [{{"role": "user", "content": "What is 1 + 2?"}}]
for name in "full", "lora", "scratch":
    folder = f"{tmp_path}/{{name}}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    made = model.generate(**ids, max_new_tokens=5, do_sample=False)
    print("generated", made.shape[1] > ids["input_ids"].shape[1])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("generated True") == 3, done.stderr


def test_code_that_comes_with_a_model_is_run_only_when_asked(
    models, questions, tmp_path, monkeypatch
):
    cache = str(tmp_path / "cache")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
    monkeypatch.setattr(sys, "path", [cache, *sys.path])
    folder, ran = Path(shutil.copytree(models["llama"], tmp_path / "model")), tmp_path / "ran"
    (folder / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(ran)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="cannot be loaded .*contains custom code"):
        run.main(flags_of(str(folder), questions, tmp_path / "out"))
    with pytest.raises(ValueError, match="cannot be loaded .*contains custom code"):
        model.open_model(str(folder), torch.float32)
    assert not ran.exists()
    model.open_model(str(folder), torch.float32, trust_remote_code=True)
    assert ran.exists()


def test_keys_of_loading_reach_the_loaders(models, questions, tmp_path, monkeypatch):
    calls = []
    for loader in (AutoModelForCausalLM, AutoTokenizer):
        real = loader.from_pretrained

        def load(name, *, cache_dir, trust_remote_code, real=real, **options):
            calls.append((cache_dir, trust_remote_code))
            return real(name, **options)

        monkeypatch.setattr(loader, "from_pretrained", load)
    flags = "--model.cache_dir mc --trust_remote_code"
    make_trainer(models["llama"], questions, tmp_path / "out", flags)
    assert calls == [("mc", True), ("mc", True)]


# ---- runs


def launch(*flags, processes=1, script=ROOT / "finetune.py"):
    """finetune.py, or another script, as a user starts it."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [*command, str(script), *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )


def finish(process):
    """What a process prints; it must succeed."""
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    return text


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(models, questions, tmp_path):
    """Dropout of the adapters, dropped terms, spans and data order included."""
    flags = "--span --lora --jepa_ratio 0.5 --batch_size 2 --grad_accum 1 --num_epochs 25"
    flags += " --save_steps 10 --learning_rate 1e-3"
    out = tmp_path / "cut"
    again = flags_of(models["llama"], questions, out, flags)
    whole = launch(*flags_of(models["llama"], questions, tmp_path / "whole", flags))
    cut = launch(*again)
    until = time.time() + 120
    while not (out / "checkpoint-20" / "trainer_state.json").exists() and time.time() < until:
        time.sleep(0.01)
    cut.send_signal(signal.SIGKILL)
    cut.wait()
    finish(whole)
    assert not (out / "result.json").exists()
    refused, _ = launch(*again).communicate()
    advice = "holds checkpoints; set training.resume: auto to continue"
    assert advice in refused.splitlines()[-1]
    text = finish(launch(*again, "--resume", "auto"))
    assert text.strip().splitlines()[-1].startswith("result: {")
    expected, found = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    one, other = (read_losses(tmp_path / name) for name in ("whole", "cut"))
    assert torch.equal(one.nan_to_num(), other.nan_to_num())  # each step once
    one, other = (result_of(tmp_path / name) for name in ("whole", "cut"))
    assert other["train_loss"] == one["train_loss"]
    assert one["resumed_from"] == 0 and other["resumed_from"] >= 20


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--predictors 1 --linear_predictor", "--span"])
def test_two_processes_train_as_one(models, questions, tmp_path, flags):
    """Uneven labels and pairs a process; the same examples a step, so the same losses."""
    flags += f" --eval_file {questions} --max_eval_items 5 --num_epochs 3 --optimizer sgd"
    flags += " --learning_rate 1e-3"
    for processes, accum in ((1, "--grad_accum 2"), (2, "--grad_accum 1")):
        out = tmp_path / str(processes)
        command = flags_of(models["llama"], questions, out, flags, accum)
        finish(launch(*command, processes=processes))
    one, two = (result_of(tmp_path / name) for name in ("1", "2"))
    for key in ("train_loss", "ce_loss", "jepa_loss", "eval_loss", "eval_jepa_loss"):
        assert one[key] == pytest.approx(two[key], rel=1e-4), key
    names = {"model.safetensors", "optimizer.pt", "trainer_state.json"}
    names |= {"rng_state_0.pth", "rng_state_1.pth"}
    assert names <= read_sealed(tmp_path / "2" / "checkpoint-3" / "sha256.json").keys()
    close(weights(tmp_path / "2"), weights(tmp_path / "1"))


@pytest.mark.slow
def test_sharded_forward_and_backward_equal_the_whole_model(models, questions, tmp_path):
    """accelerate shards (FSDP2) on CUDA alone, so here it is done by hand on two processes."""
    arguments = models["llama"], questions, str(tmp_path / "out")
    code = f"""
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from nanojepa.device import end_rank
import hf
from test_finetune import make_trainer
trainer = make_trainer(*{arguments!r}, "--predictors 2 --linear_predictor")
batch = hf.one_batch(trainer, trainer.train_dataset)

def backward():
    ce, term = trainer.sums(trainer.model, batch)
    (ce + term).backward()

backward()
expected = {{name: p.grad.clone() for name, p in trainer.model.named_parameters()}}
trainer.model.zero_grad()
if not dist.is_initialized():
    dist.init_process_group("gloo")
for layer in trainer.model.model.layers:
    fully_shard(layer)
fully_shard(trainer.model)
backward()
for name, p in trainer.model.named_parameters():
    torch.testing.assert_close(p.grad.full_tensor(), expected[name], rtol=1e-4, atol=1e-5)
assert isinstance(p, torch.distributed.tensor.DTensor)
end_rank()
"""
    (tmp_path / "shard.py").write_text(code)
    finish(launch(processes=2, script=tmp_path / "shard.py"))  # each process asserts


SHARDED = """
import os, torch, torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_apply_ac, fsdp2_prepare_model
from nanojepa.device import end_rank
from nanojepa.hf import run
import hf
from test_finetune import configure, silent

if not dist.is_initialized():
    dist.init_process_group("gloo")
rank, arguments = dist.get_rank(), ARGUMENTS


def build(flags):
    trainer = run.make_trainer(configure(*arguments, flags), silent)
    torch.manual_seed(7)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # it starts at zero, which would hide the adapters
            torch.nn.init.normal_(parameter, std=0.5)
    trainer.model.train()
    return trainer


def gradients(trainer, model):
    batch = hf.one_batch(trainer, trainer.train_dataset[4 * rank : 4 * rank + 4])
    torch.manual_seed(100 + rank)  # of what is dropped
    sums = trainer.sums(model, batch)
    (sums.ce + sums.term).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def shard(trainer):
    plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    accelerator = trainer.accelerator
    accelerator.state.fsdp_plugin = plugin
    assert accelerator.gradient_state.plugin_kwargs["sync_each_batch"]
    plugin.set_auto_wrap_policy(trainer.model)
    model = trainer.model
    if plugin.activation_checkpointing:
        model = fsdp2_apply_ac(accelerator, model)
    return fsdp2_prepare_model(accelerator, model)


whole = build("--lora --predictors 1")
expected = gradients(whole, whole.model)
for g in expected.values():
    dist.all_reduce(g)
trainer = build("--lora --predictors 1 --fsdp --gradient_checkpointing")
found = gradients(trainer, shard(trainer))
assert found.keys() == expected.keys() and len(found) > 20
for name, g in expected.items():
    torch.testing.assert_close(found[name].full_tensor(), g / 2, rtol=1e-4, atol=1e-5)
end_rank()
"""


@pytest.mark.slow
def test_adapters_dropout_sharding_and_recomputation_together(models, questions, tmp_path):
    """Through accelerate's own preparation, whose recomputation would drop other units."""
    arguments = models["llama"], questions, str(tmp_path / "out")
    (tmp_path / "shard.py").write_text(SHARDED.replace("ARGUMENTS", repr(arguments)))
    finish(launch(processes=2, script=tmp_path / "shard.py"))  # each process asserts


@pytest.mark.parametrize("lora", ["", "--lora"])
def test_the_head_in_parts_has_the_gradients_of_the_whole(
    models, questions, tmp_path, monkeypatch, lora
):
    def made():
        trainer = make_trainer(models["qwen"], questions, tmp_path / "out", "--predictors 1", lora)
        return one_step(trainer)

    (whole, line), at_once = made(), model.LABELS_AT_ONCE
    monkeypatch.setattr(model, "LABELS_AT_ONCE", 5)
    parts, other = made()
    assert at_once > 1000 and other["ce_loss"] == pytest.approx(line["ce_loss"], rel=1e-6)
    close(parts, whole, rtol=1e-4)


def test_sharded_gradients_are_summed_in_float32():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    keep_precision(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert policy.output_dtype is None  # a loss stays float32
    keep_precision(SimpleNamespace(state=SimpleNamespace()))  # nothing is sharded


def test_evaluation_is_a_mean_over_labels_and_pairs(models, questions, tmp_path):
    """Before any training too."""
    flags = f"--eval_file {questions} --predictors 1 --batch_size 3"
    trainer = make_trainer(models["llama"], questions, tmp_path, flags)
    ce, term, _ = Reference(trainer, "llama").losses()
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(ce, rel=1e-5)
    assert found["eval_jepa_loss"] == pytest.approx(term, rel=1e-4)


def test_dropped_steps_cost_a_plain_step_and_are_no_zero_in_the_log(models, questions, tmp_path):
    """A dropped step encodes no view, and its losses are those of a regular run."""
    flags = "--predictors 1 --jepa_ratio 0.5 --num_epochs 20 --grad_accum 2 --learning_rate 0"
    trainer = make_trainer(models["llama"], questions, tmp_path, flags)
    trainer.train()
    lines = losses(trainer)
    kept = [keeps_term(42, n, 0.5) for n in range(20)]
    assert ["jepa_loss" in line for line in lines] == kept and 4 < sum(kept) < 16
    # The whole set is a step and the rate is 0: one value, which dropped steps don't lower.
    values = [line["jepa_loss"] for line in lines if "jepa_loss" in line]
    assert max(values) - min(values) < 1e-4
    plain, full = (hf.one_batch(trainer, trainer.train_dataset, term) for term in (False, True))
    assert plain.drawn is None and (plain.targets >= 0).sum() == (full.targets >= 0).sum()
    assert plain.idx.numel() < 0.7 * full.idx.numel()
    whole, always = (
        one_step(make_trainer(models["llama"], questions, tmp_path / "b", own))[0]
        for own in ("--jepa_ratio 1", "")
    )
    assert all(torch.equal(whole[name], always[name]) for name in whole)


@pytest.mark.parametrize("flags", ["--predictors 1", "--span", "--step_jepa --jepa_mse", "--lora"])
def test_a_pass_never_waits_for_the_device(models, questions, tmp_path, monkeypatch, flags):
    """Tensors of the meta device hold no numbers: whatever reads one fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    trainer = make_trainer(models["llama"], questions, tmp_path / "out", flags)
    loader = iter(trainer.get_train_dataloader())
    (*_, batches), counts = trainer.get_batch_samples(loader, 2, trainer.args.device)
    trainer.model.to("meta")
    trainer.losses = trainer.losses.to("meta")
    loss = trainer.compute_loss(trainer.model, batches[0].to(torch.device("meta")), False, counts)
    loss.backward()
    assert loss.is_meta


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_a_pass_on_a_gpu_equals_the_cpu_s(models, questions, tmp_path, attention):
    results = []
    for kind, name in (("sdpa", "cpu"), (attention, "cuda")):
        device = torch.device(name)
        flags = f"--predictors 1 --attn_implementation {kind}"
        trainer = make_trainer(models["llama"], questions, tmp_path / "out", flags)
        trainer.model.to(device)
        sums = trainer.sums(trainer.model, hf.one_batch(trainer, trainer.train_dataset).to(device))
        sum(sums).backward()
        gradients = {n: p.grad.cpu() for n, p in trainer.model.named_parameters()}
        results.append((torch.stack(sums).cpu(), gradients))
    (x, expected), (y, found) = results
    torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-4)  # Triton's products may be TF32
    close(found, expected, rtol=2e-2, atol=2e-3)


def test_nothing_calls_cuda_on_a_cpu(models, questions, tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a machine without CUDA")

    def fail(*args, **options):
        raise AssertionError("a CUDA call")

    names = "synchronize max_memory_allocated memory_allocated empty_cache set_device"
    names += " current_device get_device_name get_device_properties reset_peak_memory_stats"
    for name in names.split():
        monkeypatch.setattr(torch.cuda, name, fail)
    train(models["llama"], questions, tmp_path / "out", "--num_epochs 1")


def test_weights_of_the_loss(models, questions, tmp_path):
    lines = {}
    for name, flags in {"a": "", "b": "--lbd 2", "c": "--gamma 3"}.items():
        trainer = make_trainer(models["llama"], questions, tmp_path / name, flags)
        lines[name] = one_step(trainer)[1]
    for name, gamma, lbd in (("a", 1, 0.1), ("b", 1, 2), ("c", 3, 0.1)):
        expected = gamma * lines["a"]["ce_loss"] + lbd * lines["a"]["jepa_loss"]
        assert lines[name]["loss"] == pytest.approx(expected, rel=1e-4)


def test_flops_of_the_first_ten_steps_are_printed(models, questions, tmp_path, capsys):
    flags = "--track_flop --num_epochs 12 --batch_size 2"
    trainer = make_trainer(models["llama"], questions, tmp_path, flags)
    trainer.train()
    printed = re.findall(r"step (\d+): (\S+) FLOPs", capsys.readouterr().out)
    assert [int(n) for n, _ in printed] == list(range(1, 11))
    mean = sum(float(flops) for _, flops in printed) / 10
    # Other examples lie side by side in other steps, so the padding differs.
    assert mean == pytest.approx(trainer.state.total_flos / 12, rel=0.05)


@pytest.mark.parametrize("flags", ["", "--lora"])
def test_flops_are_those_of_torch_s_counter(models, questions, tmp_path, flags):
    """It counts eager attention's products. It leaves out norms and the embeddings' gradient."""
    flags += " --attn_implementation eager"
    trainer = make_trainer(models["llama"], questions, tmp_path / "out", flags)
    batch = hf.one_batch(trainer, trainer.train_dataset)
    trainer.model.train()
    with FlopCounterMode(display=False) as counter:
        sum(trainer.sums(trainer.model, batch)).backward()
    assert counter.get_total_flops() == pytest.approx(trainer.floating_point_ops([batch]), rel=0.05)


def test_same_flop_makes_fewer_steps(models, questions, tmp_path):
    costs = []
    for ratio in ("", "--jepa_ratio 0.5"):
        said, flags = [], f"--same_flop --num_epochs 40 --predictors 1 {ratio}"
        trainer = make_trainer(models["llama"], questions, tmp_path, flags, say=said.append)
        costs.append(float(re.search(r"a step costs (\S+) of", said[-1])[1]))
        assert trainer.args.max_steps == int(40 / costs[-1]) and "instead of 40" in said[-1]
    assert 1.2 < costs[0] < 3
    assert costs[1] == pytest.approx((1 + costs[0]) / 2, abs=2e-3)


@pytest.mark.parametrize("trained", ["--predictors 1 --views prefix", "--regular"])
def test_the_views_of_a_saved_model_are_those_it_trained(models, questions, tmp_path, trained):
    """Those of a run without a term are the default's. What max_length cuts is left out."""
    out = tmp_path / "out"
    train(models["qwen"], questions, out, "--learning_rate 1e-3 --lora --max_length 120", trained)
    long = "word " * 150
    data = hf.write_messages(tmp_path / "more.jsonl", [*QUESTIONS, (None, long, "x"), QUESTIONS[0]])
    network, tokenizer = model.open_model(str(out), torch.float32)
    from nanojepa.eval.similarity import states_of_views

    views = run.views_of(network, run.Chat(tokenizer), out, read_examples(data))
    found = states_of_views(*views, 3)
    assert found.group.tolist() == [*range(9)] and found.u.shape == found.v.shape == (9, 32)
    saved = AutoModelForCausalLM.from_pretrained(out)
    before, user, *_ = write("qwen", *QUESTIONS[4])
    text = before + user + "<|predictor_1|>"
    if trained == "--regular":
        text = write_alone("qwen", "user") + user
    ids = tokenizer.encode(text, add_special_tokens=False)
    h = saved(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
    torch.testing.assert_close(found.u[4], h.detach(), rtol=1e-3, atol=1e-4)


# ---- settings

# The keys of seeds and upstream, with their documented defaults.
DOCUMENTED = {
    "general": dict(
        debug=0,
        finetune_seed=42,
        use_wandb=False,
        wandb_project="jepa-llm",
        wandb_run_name="",
        wandb_entity="",
        wandb_group="",
        wandb_tags="",
        wandb_mode="online",
    ),
    "model": dict(
        name="meta-llama/Llama-3.2-1B-Instruct",
        use_lora=False,
        lora_rank=16,
        pretrain=False,
        cache_dir="",
        trust_remote_code=False,
    ),
    "dataset": dict(
        train_file="",
        eval_file="",
        data_file="",
        eval_split=0.2,
        split_seed=42,
        max_items=0,
        max_eval_items=0,
        config_name="",
        train_split="",
        max_length=512,
        predictors=0,
        train_all=False,
        plain=False,
        remove_thinking=True,
        cache_dir="",
        tokenize_batch_size=1000,
    ),
    "training": dict(
        batch_size=4,
        grad_accum=4,
        learning_rate=2e-5,
        num_epochs=3,
        eval_steps=10,
        save_total_limit=2,
        logging_steps=1,
        lbd=0.1,
        gamma=1.0,
        regular=False,
        track_flop=False,
        additive_mask=False,
        memory_efficient=False,
        dtype="bf16",
        jepa_ratio=-1.0,
        step_jepa=False,
        span=False,
        jepa_l2=False,
        jepa_mse=False,
        infonce=False,
        front_pred=False,
        reverse_pred=False,
        same_flop=False,
        linear_predictor=False,
    ),
}


def load(flags=""):
    return load_settings(settings.Config, flags.split(), aliases=settings.ALIASES)


def test_documented_keys_have_their_defaults():
    cfg, origin, _ = load()
    for section, keys in DOCUMENTED.items():
        for key, value in keys.items():
            assert getattr(getattr(cfg, section), key) == value, key
            assert origin[f"{section}.{key}"] == "default"


COMMANDS = [  # as the replaced scripts' pages have them, after the script's name
    "--regular --lora",
    "--predictors 2 --lbd 0.5 --lora",
    "--step_jepa --predictors 2 --lbd 0.1 --lora",
    "--step_jepa --lbd 0.1 --gamma 1.0 --last_token -2 --lora --lora_rank 16 --finetune_seed 42",
    "--predictors 2 --lbd 0.5 --gamma 1.0 --last_token -2 --lora --finetune_seed 42",
    "--step_jepa --lbd 0.1 --jepa_l2 --lora",
    "--step_jepa --lbd 0.1 --jepa_mse --lora",
    "--step_jepa --lbd 0.1 --infonce --lora",
    "--step_jepa --lbd 0.5 --finetune_seed 82 --lora",
    "--additive_mask --lbd 2 --predictors 3 --seed 82",
    "--front_pred --predictors 1",
    "--reverse_pred",
    "--jepa_ratio 0.25 --same_flop",
    "--track_flop --debug 5",
    "--pretrain --plain --trainall",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_replaced_scripts_run(models, questions, tmp_path, command, capsys):
    flags = "--num_epochs 1 --logging_steps 3"
    run.main(flags_of(models["llama"], questions, tmp_path / "out", flags, command))
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("result: {")


def test_the_objective_is_one_setting(tmp_path):
    """Whichever of its names is given; choices are those of the table."""
    for flags, name in [
        ("", "pair"),
        ("--objective step", "step"),
        ("--step_jepa", "step"),
        ("--span --regular=false", "span"),
        ("--regular", ""),
        ("--lbd 0 --span", ""),
    ]:
        assert load(flags).config.objective == name, flags
    file = tmp_path / "run.yaml"
    file.write_text("general: {debug: true}\ntraining: {lbd: 2, span: true}\n")
    cfg = load(f"--config {file} --lbd 3 --lora").config
    assert (cfg.general.debug, cfg.training.lbd, cfg.objective) == (1, 3.0, "span")
    assert cfg.model.use_lora and cfg.distance == "cosine"
    assert [load(f"--{f}").config.distance for f in ("jepa_l2", "jepa_mse", "infonce")] == [
        "l2",
        "mse",
        "infonce",
    ]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--cache_dir c", "--model.cache_dir or --dataset.cache_dir"),
        ("--preditors 1", r"unknown .*--preditors; did you mean"),
        ("--step_jepa --span", "choose one of step_jepa, span"),
        ("--jepa_l2 --infonce", "choose one of jepa_l2, infonce"),
        ("--jepa_l2 --distance mse", "choose one of jepa_l2, distance=mse"),
        ("--objective span --reverse_pred", "training.objective=span: it compares no two texts"),
        ("--objective step --span", "choose one of span, objective=step"),
        ("--jepa_ratio 0", "jepa_ratio=0.0"),
        ("--last_token 2", "last_token=2"),
        ("--dtype int8", "training.dtype=int8: must be bf16, fp16 or float32"),
        ("--predictors 11", "dataset.predictors=11: must be at least 0 and at most 10"),
        ("--span --predictors 1", "training.objective=span: it compares no two texts"),
        ("--views both", "dataset.views=both"),
        ("--objective nothing", "training.objective=nothing: must be span, pair"),
        ("--data_file x --eval_file y", "dataset.eval_file: data_file is split"),
        ("--data_file x --eval_split 1", "eval_split=1: leaves nothing"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        load(flags)


def test_misuse_ends_in_one_line(models, questions, tmp_path):
    llama, out, finished = models["llama"], tmp_path / "out", tmp_path / "finished"
    bad = tmp_path / "bad.jsonl"
    wrong = '{"messages": [{"role": "user", "content": "x"}]}\n'
    bad.write_text(Path(questions).read_text() + wrong)
    single = hf.write_messages(tmp_path / "single.jsonl", [(None, "q", "one step")])
    finished.mkdir()
    (finished / "result.json").write_text("{}")
    for name, data, folder, flags, message in [
        (llama, str(bad), out, "", r"bad.jsonl, line 9: .*assistant"),
        (llama, str(tmp_path / "none.jsonl"), out, "", "none.jsonl: neither a file nor a dataset"),
        (str(tmp_path), questions, out, "", f"{tmp_path}: cannot be loaded"),
        (llama, single, out, "--step_jepa", "no training example has a JEPA term"),
        (llama, questions, finished, "", "holds a finished run"),
        (llama, questions, llama, "", "is the model's own folder"),
        (
            llama,
            questions,
            out,
            f"--resume {tmp_path}/no",
            "/no: no sha256.json, so it is no checkpoint",
        ),
        (llama, questions, out, "--max_length 12", "no example has a label left"),
        (llama, questions, out, f"--data_file {questions}", "give either dataset.train_file or"),
        (llama, questions, out, "--fsdp", "training.fsdp: needs CUDA"),
        (llama, questions, out, "--weights bfloat16", "needs optimizer: adamw_torch_8bit"),
        (llama, questions, out, "--dtype fp16", "training.dtype=fp16: needs CUDA"),
    ]:
        with pytest.raises(SystemExit) as refused:
            run.main(flags_of(name, data, folder, flags))
        assert re.match("error: [^\n]*" + message, str(refused.value)), refused.value
        assert "\n" not in str(refused.value)


def test_an_optimizer_of_a_package_that_is_missing_names_it(models, questions, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="optimizer=adamw_torch_4bit: pip install torchao"):
        train(models["llama"], questions, "nowhere", "--optimizer adamw_torch_4bit")


# How a key changes a run: the value, or (flags without it, the value).
WANDB = "--use_wandb --wandb_mode offline"
CHANGES = {
    "general.debug": "1",
    "general.finetune_seed": "7",
    "general.use_wandb": "true --general.wandb_mode offline",
    "general.wandb_project": (WANDB, "p"),
    "general.wandb_run_name": (WANDB, "r"),
    "general.wandb_entity": (WANDB, "e"),
    "general.wandb_group": (WANDB, "g"),
    "general.wandb_tags": (WANDB, "a,b"),
    "general.wandb_mode": ("--use_wandb", "disabled"),
    "model.use_lora": "true",
    "model.lora_rank": ("--lora", "4"),
    "model.lora_targets": ("--lora", "q_proj"),
    "model.pretrain": "true",
    "model.attn_implementation": "eager",
    "dataset.eval_file": "QUESTIONS",
    "dataset.max_length": "40",
    "dataset.predictors": "2",
    "dataset.views": "prefix",
    "dataset.train_all": "true",
    "dataset.plain": "true",
    "training.batch_size": "2",
    "training.grad_accum": "2",
    "training.learning_rate": "0.1",
    "training.num_epochs": "5",
    "training.eval_steps": "7",
    "training.save_steps": "3",
    "training.save_total_limit": "5",
    "training.logging_steps": "9",
    "training.last_token": "-1",
    "training.objective": "span",
    "training.regular": "true",
    "training.step_jepa": "true",
    "training.span": "true",
    "training.front_pred": ("--predictors 1", "true"),
    "training.reverse_pred": "true",
    "training.linear_predictor": "true",
    "training.distance": "l2",
    "training.jepa_l2": "true",
    "training.jepa_mse": "true",
    "training.infonce": "true",
    "training.jepa_ratio": "0.5",
    "training.same_flop": "true",
    "training.memory_efficient": "true",
    "training.gradient_checkpointing": "true",
    "training.dtype": "bf16",
    "training.optimizer": "sgd",
}
ELSEWHERE = """
general.show model.name model.cache_dir model.trust_remote_code dataset.train_file dataset.data_file
dataset.eval_split dataset.split_seed dataset.max_items dataset.max_eval_items dataset.config_name
dataset.train_split dataset.test_split dataset.columns dataset.bad dataset.remove_thinking
dataset.date dataset.cache_dir
dataset.preprocess_num_proc dataset.tokenize_num_proc dataset.tokenize_batch_size
training.weights training.micro_batch_tokens training.output_dir training.lbd training.additive_mask
training.gamma training.track_flop training.fsdp training.resume
"""


def test_every_key_is_changed_by_some_test():
    keys = {
        f"{section}.{name}"
        for section, kind in settings.Config.__annotations__.items()
        for name in kind.__dataclass_fields__
    }
    assert keys == CHANGES.keys() | set(ELSEWHERE.split())


@pytest.fixture(scope="module")
def outcomes(models, questions, tmp_path_factory):
    """A function of flags: all that a key may change of a run. It remembers what it has made."""
    out, known = tmp_path_factory.mktemp("outcomes") / "out", {}

    def make(flags):
        said = []
        cfg = configure(models["llama"], questions, out, flags)
        if cfg.general.use_wandb:
            run.set_wandb_environment(cfg.general)
        trainer = run.make_trainer(cfg, lambda line: said.append(re.sub(r"\S*/", "", line)))
        network, args = trainer.model, trainer.args.to_dict()
        return {
            "said": said,
            "examples": trainer.train_dataset,
            "evaluated": trainer.eval_dataset,
            "parameters": [
                (name, p.shape, p.requires_grad, p.double().sum().item())
                for name, p in network.named_parameters()
            ],
            "attention": network.config._attn_implementation,
            "recomputes": network.is_gradient_checkpointing,
            "term": (cfg.distance, cfg.ratio),
            "arguments": {name: value for name, value in args.items() if name != "logging_dir"},
            "environment": {k: v for k, v in os.environ.items() if k.startswith("WANDB")},
            "order": [batch[0].documents for batch in trainer.get_train_dataloader()],
        }

    def outcome(flags):
        if flags not in known:
            kept = dict(os.environ)
            try:
                known[flags] = make(flags)
            finally:
                os.environ.clear()
                os.environ.update(kept)
        return known[flags]

    return outcome


@pytest.mark.parametrize("key", CHANGES)
def test_a_key_changes_the_run(outcomes, questions, key):
    base, value = CHANGES[key] if isinstance(CHANGES[key], tuple) else ("", CHANGES[key])
    value = value.replace("QUESTIONS", questions)
    assert outcomes(base) != outcomes(f"{base} --{key} {value}")


def test_the_same_settings_make_the_same_run(outcomes):
    assert outcomes("") == outcomes("--training.regular=false")


# ---- damaged files

STEPS = "--linear_predictor --predictors 1 --num_epochs 2 --batch_size 4 --grad_accum 1"
STEPS += " --save_steps 1 --learning_rate 1e-3"


@pytest.fixture(scope="module")
def finished(models, questions, tmp_path_factory):
    """The output folder of a run of four steps, with a file of somebody else's in it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    train(models["llama"], questions, out, STEPS)
    return out


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy of it that may be continued from its third step."""
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    (out / "result.json").unlink()
    return out


def refuse_damage(file, read):
    """Damage a file in several ways: each time read() must raise one line with its name."""
    content = file.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    try:
        for damaged in (b"", content[:-1], content[1:], flipped, content + b"\n", None):
            if damaged is None:
                file.unlink()
                if file.name == "sha256.json":  # without it nothing is checked
                    continue
            else:
                file.write_bytes(damaged)
            with pytest.raises(ValueError) as e:
                read()
            assert str(file) in str(e.value) and "\n" not in str(e.value), e.value
    finally:
        file.write_bytes(content)


def test_what_is_sealed_is_what_a_run_has_written(finished):
    names = {path.name for path in finished.iterdir()}
    checkpoints = {"checkpoint-3", "checkpoint-4"}
    assert {name for name in names if name.startswith("checkpoint")} == checkpoints
    sealed = read_sealed(finished / "sha256.json").keys()
    others = {"notes.txt", "metrics.jsonl", "environment.json", "result.json", "sha256.json"}
    assert names - sealed == checkpoints | others and "model.part" not in names
    mine = {
        "model.safetensors",
        model.OBJECTIVE_FILE,
        "config.yaml",
        "config.json",
        "tokenizer.json",
    }
    assert mine <= sealed
    for name in checkpoints:
        files = {path.name for path in (finished / name).iterdir()}
        assert files - read_sealed(finished / name / "sha256.json").keys() == {"sha256.json"}


def test_no_mutation_of_a_finished_model_is_silent(finished, questions, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    cfg = configure(str(out), questions, tmp_path / "next", "--linear_predictor")
    for name in [*read_sealed(out / "sha256.json"), "sha256.json"]:
        refuse_damage(out / name, lambda: run.make_trainer(cfg, silent))
        refuse_damage(out / name, lambda: model.open_model(str(out), torch.float32))
    (out / "result.json").write_text("{}")  # what is not the model's may change
    (out / "predictions.jsonl").touch()
    run.make_trainer(cfg, silent)


def test_no_mutation_of_a_checkpoint_is_silent(unfinished):
    """By name it is refused; with auto it is named, and the one before it is used."""
    newest, before, said = unfinished / "checkpoint-4", unfinished / "checkpoint-3", []

    def find(resume="auto"):
        said.clear()
        return find_checkpoint(unfinished, str(resume), said.append)

    assert find() == find(newest) == newest and not said
    names = [*read_sealed(newest / "sha256.json"), "sha256.json"]
    parts = {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert parts | {"trainer_state.json"} <= set(names)

    def read(file):
        assert find() == before
        (line,) = said
        assert line.startswith("warning: damaged checkpoint: ") and str(file) in line
        find(newest)

    for name in names:
        refuse_damage(newest / name, lambda name=name: read(newest / name))
    for folder in (newest, before):
        (folder / "sha256.json").unlink()
    with pytest.raises(ValueError, match="checkpoint-3: no sha256.json.*no checkpoint .* is whole"):
        find()


def assert_same_run(one, other):
    expected, found = weights(one), weights(other)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert torch.equal(read_losses(one), read_losses(other))
    for folder in (one, other):
        names = sorted(path.name for path in folder.glob("checkpoint*"))
        assert names == ["checkpoint-3", "checkpoint-4"]
        for part in ("", *names):
            check_seal(folder / part)


def test_a_run_goes_on_from_the_last_whole_checkpoint(
    models, questions, finished, tmp_path, monkeypatch, capsys
):
    """Killed while the third of four is written, of which one is kept; then the newest damaged."""
    out, seal = tmp_path / "out", export.seal_folder

    def go_on(flags):
        return train(models["llama"], questions, out, STEPS, flags)

    def killed(folder):
        if folder.name == "checkpoint-3":
            raise KeyboardInterrupt
        seal(folder)

    monkeypatch.setattr(export, "seal_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        go_on("--save_total_limit 1")
    monkeypatch.undo()
    left = sorted(path.name for path in out.glob("checkpoint*"))
    assert left == ["checkpoint-2", "checkpoint.part"]
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"loss": 1.5, "st')
    assert go_on("--resume auto --save_total_limit 2")["resumed_from"] == 2
    assert_same_run(finished, out)
    (out / "result.json").unlink()
    (out / "checkpoint-4" / "optimizer.pt").write_bytes(b"cut")
    capsys.readouterr()
    assert go_on("--resume auto")["resumed_from"] == 3
    warning = r"^warning: damaged checkpoint: \S*checkpoint-4/optimizer.pt: missing, or its sha256"
    assert re.search(warning, capsys.readouterr().out, re.M)
    assert_same_run(finished, out)


@pytest.mark.parametrize("name", ["model.safetensors", model.OBJECTIVE_FILE, "config.json"])
def test_a_damaged_model_without_a_seal_is_one_line(models, questions, unfinished, tmp_path, name):
    file = unfinished / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    (unfinished / "sha256.json").unlink()
    named = file if name == model.OBJECTIVE_FILE else file.parent
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{re.escape(str(named))}[^\n]*$"):
        run.main(flags_of(str(unfinished), questions, tmp_path / "next", STEPS))


def test_a_checkpoint_is_read_without_running_what_is_in_it(models, questions, tmp_path):
    """What a pickle would run stays undone in every file of the Trainer's that could be one."""
    flags = "--num_epochs 2 --save_steps 1 --batch_size 4 --grad_accum 2 --regular"
    out, ran = tmp_path / "out", tmp_path / "ran"
    hostile = type("Hostile", (), {"__reduce__": lambda self: (Path.touch, (ran,))})()
    train(models["llama"], questions, out, flags)
    middle = out / "checkpoint-1"
    pickles = [p for p in sorted(middle.iterdir()) if p.suffix in (".pt", ".pth", ".bin")]
    assert len(pickles) >= 4
    for file in pickles:
        whole = file.read_bytes()
        (out / "result.json").unlink(missing_ok=True)
        torch.save(hostile, file)
        (middle / "sha256.json").unlink()
        seal_folder(middle)  # otherwise no file that has changed is opened at all
        refused = pytest.raises(Exception, match="[Ww]eights.only")
        if file.name == "training_args.bin":  # nobody reads it
            refused = contextlib.nullcontext()
        with refused:
            train(models["llama"], questions, out, flags, f"--resume {middle}")
        assert not ran.exists(), file
        file.write_bytes(whole)
    torch.save(hostile, tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert ran.exists()  # it would have
