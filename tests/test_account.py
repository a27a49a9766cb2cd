"""The account of a step against what is measured, and against formulas."""

import re
import sys
import types
from functools import partial

import pytest
import torch

import bench
import hf
import train_gpt
from conftest import CPU
from model import GPT, GPTConfig
from nanojepa.account import GPUS, account_gpt
from nanojepa.batches import divide_batch, kept_bytes
from nanojepa.hf.account import account_finetune
from nanojepa.hf.run import make_trainer
from nanojepa.hf.settings import ALIASES, Config
from nanojepa.settings import load_settings

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
    # Of n ranks, a reduction sends 2 (n - 1) / n of the bytes, and one to parts half of that.
    sent = 1.5 * 4 * (parameters - matrices) + 0.75 * 4 * matrices
    assert account.seconds["gradients over ranks"] == sent / H100.link
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


def test_a_micro_batch_is_chosen_by_what_a_token_keeps(monkeypatch):
    """kept_bytes is the account's within 15%, and a GPU gets what fits in 60% of its memory."""
    for changes in ({}, {"num_kv_heads": 1, "mlp_mult": 3}, {"num_layers": 6, "model_dim": 256}):
        shape = {**SHAPE, **changes}
        cfg = train_gpt.Config(**{k: v for k, v in shape.items() if k != "vocab_size"})
        make = maker(**changes, value_embed=False, dtype=torch.bfloat16)
        less, more = (account_gpt(make, rows, 64, H100).memory["activations"] for rows in (8, 16))
        kept = (more - less) / (8 * 64)
        assert kept_bytes(cfg) == pytest.approx(kept, rel=0.15)
    cfg = train_gpt.Config(train_batch_tokens=2**19, train_seq_len=1024)
    card = types.SimpleNamespace(total_memory=40_000 * kept_bytes(cfg) / 0.6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    share = divide_batch(cfg, 0, 8, torch.device("cuda", 0))
    assert share.micro_rows == 32  # of 64 rows a rank, those of 40,000 tokens that come out even


# ---- fine-tuning


@pytest.fixture(scope="module")
def finetuning(tmp_path_factory):
    """Flags of finetune.py: a model of which some MB are kept, and its data."""
    folder = tmp_path_factory.mktemp("finetuning")
    shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    return [
        f"--model_name={hf.make_folder(folder / 'model', 'llama', **shape)}",
        f"--train_file={hf.write_messages(folder / 'questions.jsonl', hf.QUESTIONS)}",
        f"--output_dir={folder / 'out'}",
        "--dtype=float32",
        "--predictors=1",
    ]


@pytest.mark.parametrize("flags", [[], ["--gradient_checkpointing"], ["--lora"]], ids=str)
def test_the_memory_of_a_pass_is_what_it_takes(finetuning, flags):
    """Within 15%: the profiler sees scratch space of kernels too."""
    cfg = load_settings(Config, finetuning + flags, aliases=ALIASES).config
    trainer = make_trainer(cfg, say=lambda line: None)
    trainer.model.train()
    chunks = [trainer.train_dataset[n : n + 4] for n in range(0, 16, 4)]
    (batch,) = trainer.packer.split(chunks, [0] * 4, True, 0, 16)
    for p in trainer.model.parameters():  # gradients are counted on their own
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    measured = bench.peak_memory(lambda: sum(trainer.sums(trainer.model, batch)).backward(), CPU, 0)
    found = account_finetune(cfg, H100, 1, lambda line: None)
    assert found.memory["activations and temporary"] == pytest.approx(measured, rel=0.15)
    trained = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    assert found.memory["gradients"] == trained and found.tokens == batch.idx.numel()
    assert found.parameters == sum(p.numel() for p in trainer.model.parameters())
    assert found.flops == trainer.floating_point_ops([batch])


def test_sharding_divides_what_is_kept_and_sends_weights(finetuning):
    one, eight = (
        account_finetune(
            load_settings(Config, [*finetuning, *flags], aliases=ALIASES).config, H100, 8, print
        )
        for flags in ([], ["--fsdp"])
    )
    for kind in ("weights", "gradients", "optimizer"):
        assert eight.memory[kind] == one.memory[kind] / 8
    assert one.memory["gathered weights of two blocks"] == 0
    assert eight.memory["gathered weights of two blocks"] > 0
    assert eight.seconds["gradients over ranks"] == 0 < one.seconds["gradients over ranks"]
    # The weights twice and the gradients once, in float32, over the links.
    sent = 12 * one.parameters * 7 / 8 / H100.link
    assert eight.seconds["passes"] == pytest.approx(max(sent, one.seconds["passes"]))


def test_bfloat16_weights_take_six_bytes_a_parameter(finetuning):
    flags = ["--dtype=bf16", "--weights=bfloat16", "--optimizer=adamw_torch_8bit"]
    cfg = load_settings(Config, finetuning + flags, aliases=ALIASES).config
    found = account_finetune(cfg, H100, 1, print)
    held = sum(found.memory[kind] for kind in ("weights", "gradients", "optimizer"))
    assert held == 6 * found.parameters


def test_an_account_of_fine_tuning_is_printed(finetuning, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--account=h200", "--finetune", *finetuning])
    bench.main()
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"result: 1 x h200: .* MFU, [\d.]+ of 141 GB a rank", last)


# ---- the table


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
        r"result: 2 x h200: [\d.]+ ms a step, [\d,]+ tokens/s, \d+% MFU, [\d.]+ of 141 GB a rank",
        lines[-1],
    )
