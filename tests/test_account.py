"""The account of a step against what is measured, and against formulas."""

import re
import sys
from functools import partial

import pytest
import torch

import bench
from model import GPT, GPTConfig
from nanojepa.account import GPUS, account_gpt

SHAPE = dict(vocab_size=2048, num_layers=3, model_dim=128, num_heads=4, num_kv_heads=4, mlp_mult=4)
H100 = GPUS["h100"]


def maker(**changes):
    return partial(GPT, GPTConfig(**{**SHAPE, **changes}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, rows, length",
    [
        ({}, 8, 256),
        ({"num_layers": 6, "model_dim": 256}, 16, 256),
        ({"tie_embeddings": True, "value_embed": False, "vocab_size": 8192}, 4, 512),
    ],
    ids=["small", "default", "wide head"],
)
def test_the_memory_is_that_of_the_compiled_step(changes, rows, length):
    """Within 15%: the compiler fuses less than ideally here and there, and pads."""
    model = maker(**changes)()
    idx = torch.randint(0, model.config.vocab_size, (rows, length))
    loss = torch.compile(lambda: model(idx, idx), fullgraph=True, dynamic=False)

    def step():
        model.zero_grad()
        loss().backward()

    step()
    model.zero_grad()
    measured = bench.peak_memory(step, torch.device("cpu"), persistent=0)
    memory = account_gpt(maker(**changes), rows, length, H100, on_cpu=True).memory
    reckoned = memory["activations"] + memory["gradients and temporary"]
    assert reckoned == pytest.approx(measured, rel=0.15)


def test_what_can_be_counted_by_hand():
    account = account_gpt(maker(), 2, 64, H100, ranks=4, micro_batches=3)
    model = maker()()
    parameters = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    assert account.parameters == parameters and account.tokens == 2 * 64 * 4 * 3
    assert account.flops == 3 * model.flops(2 * 64, 2 * 64 * 65 // 2)
    assert account.memory["weights"] == 4 * parameters
    assert account.memory["optimizer"] == 4 * matrices + 8 * (parameters - matrices)
    assert account.memory["gradients of earlier micro-batches"] == 4 * parameters
    # Of n ranks, a reduction sends 2 (n - 1) / n of the bytes.
    assert account.seconds["gradients over ranks"] == 1.5 * 4 * parameters / H100.link
    one = account_gpt(maker(), 2, 64, H100)
    assert one.seconds["gradients over ranks"] == 0 and one.mfu(H100) < 1
    twice = account_gpt(maker(), 4, 64, H100)
    ratio = twice.memory["activations"] / one.memory["activations"]
    assert 1.8 < ratio < 2.1  # but for the gradients that HeadLoss keeps


def test_no_time_is_below_that_of_the_products():
    """At the card's rate the products alone take this long; the account adds what is moved."""
    account = account_gpt(maker(), 8, 128, H100)
    seconds = account.seconds["forward"] + account.seconds["backward"]
    assert seconds > account.flops / H100.flops


def test_an_account_is_printed_without_the_card(monkeypatch, capsys):
    flags = "--vocab_size 512 --num_layers 2 --model_dim 64 --num_heads 2 --num_kv_heads 2"
    flags += " --train_batch_tokens 4096 --train_seq_len 128"
    argv = ["bench.py", "--account", "h200", "--ranks", "2", *flags.split()]
    monkeypatch.setattr(sys, "argv", argv)
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0].startswith("| 0.3M parameters, 4,096 tokens a step") or "M parameters" in lines[0]
    )
    assert re.fullmatch(
        r"result: 2 x h200: [\d.]+ ms a step, [\d,]+ tokens/s, \d+% MFU, [\d.]+ GB a rank",
        lines[-1],
    )
