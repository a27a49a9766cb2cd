"""bench.py times one step in all its layouts, and counts memory, FLOPs and the peak rightly."""

import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench
import hf
from conftest import CPU, TINY, make_run, shake
from model import GPT, GPTConfig
from nanojepa.batches import draw_step
from nanojepa.hf.run import make_trainer
from nanojepa.hf.settings import ALIASES, Config
from nanojepa.objectives import OBJECTIVES
from nanojepa.settings import load_settings


def test_flops_match_torch_s_counter():
    """torch counts attention as the full square, so all pairs are given as visible."""
    T, model = 16, GPT(GPTConfig(64, 3, 32, 4, 4, 2))
    zeros = torch.zeros(2, T, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(zeros, zeros).backward()
    assert counter.get_total_flops() == model.flops(2 * T, 2 * T * T)


def test_peak_memory_sees_a_large_tensor():
    peak = bench.peak_memory(lambda: torch.ones(1000, 1000).add(1).sum(), CPU, persistent=7)
    assert 7 + 8_000_000 <= peak < 7 + 8_100_000


@pytest.mark.parametrize("seconds_per_flop", [1e-9, 1e-13])
def test_the_peak_is_measured_in_bounded_time(monkeypatch, seconds_per_flop):
    """On a machine that emulates the dtype at 1 GFLOP/s, and on a fast one."""
    passed = []

    def multiply(compute, device):
        a, b = compute.args
        passed.append(2 * a.shape[0] ** 3 * seconds_per_flop)
        return passed[-1]

    monkeypatch.setattr(bench, "timed", multiply)
    monkeypatch.setattr(torch, "randn", lambda *shape, device: torch.empty(shape, device="meta"))
    peak = bench.MatmulPeak(torch.bfloat16, CPU)
    assert peak.flops == pytest.approx(1 / seconds_per_flop)
    assert sum(passed) < 1 and passed[-1] >= bench.PEAK_SECONDS


def step_numbers(run, batches):
    """The summed losses and all gradients of the step."""
    draw_step(run.objective, batches, run.cfg.seed, 0)
    losses, weight = 0, torch.tensor(run.cfg.jepa_lambda)
    for batch in batches:
        loss, ce, term = run.loss_fn(run.model, run.objective, run.cfg, batch, weight)
        loss.backward()
        losses += torch.stack((ce, term))
    gradients = [p.grad.clone() for p in run.parameters()]
    run.model.zero_grad()
    return losses, gradients


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("pairs", {}),
        ("pairs", dict(jepa_pred_tokens=3, loss_on="target", jepa_norm=0, jepa_layer=1)),
        ("pairs", dict(jepa_pred_tokens=0, jepa_distance="mse", jepa_reverse=True)),
        ("groups", dict(jepa_pred_tokens=2, train_seq_len=64, train_batch_tokens=1024)),
    ],
)
def test_padded_rows_compute_the_packed_step(folders, kind, changes):
    """The variants that bench.py times are the same objective: losses and gradients agree."""
    run = shake(make_run(folders[kind], jepa_lambda=0.7, jepa_objective="pair", **changes))
    views = [run.data.sets["train"].views(e) for e in run.data.examples_of(0)]
    padded = bench.pad_step(run, [run.data.layout(v, run.objective) for v in views])
    assert len(padded) > 1 and len({batch.idx.shape for batch in padded}) == 1
    ours, gradients = step_numbers(run, run.data.read(0, run.share, run.objective).batches)
    theirs, expected = step_numbers(run, padded)
    assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-5)
    for own, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def finetuning(tmp_path_factory):
    """Flags of finetune.py: a tiny model and its data."""
    folder = tmp_path_factory.mktemp("finetuning")
    return [
        f"--model_name={hf.make_folder(folder / 'model', 'llama')}",
        f"--train_file={hf.write_messages(folder / 'questions.jsonl', hf.QUESTIONS)}",
        f"--output_dir={folder / 'out'}",
        "--dtype=float32",
        "--max_length=256",
    ]


@pytest.mark.parametrize("length", [0, 160])
@pytest.mark.parametrize(
    "flags",
    [
        ["--predictors=1"],
        ["--step_jepa", "--predictors=2"],
        ["--views=prefix"],
        ["--jepa_mse", "--reverse_pred"],
    ],
    ids=" ".join,
)
def test_padded_rows_compute_the_packed_sums_of_fine_tuning(finetuning, flags, length):
    cfg = load_settings(Config, finetuning + flags, aliases=ALIASES).config
    trainer = make_trainer(cfg, say=lambda line: None)
    packed = bench.packed_sums(trainer, trainer.train_dataset, term=True)
    padded = bench.padded_sums(trainer, trainer.train_dataset, length)
    assert [x.item() for x in packed] == pytest.approx([x.item() for x in padded], rel=1e-4)


def run_bench(monkeypatch, capsys, *flags):
    """The lines that bench.py prints with these flags."""
    monkeypatch.setattr(sys, "argv", ["bench.py", "--rounds=2", *flags])
    bench.main()
    return capsys.readouterr().out.splitlines()


def flags_of(data_path, compile=0):
    """Flags of train_gpt.py."""
    settings = {**TINY, "num_layers": 1, "data_path": data_path, "compile": compile}
    return [f"--{name}={value}" for name, value in settings.items()]


def names_of(lines):
    """The variants of the table, which the line of the result follows."""
    assert lines[-1].startswith("result: time over ")
    first = next(n for n, line in enumerate(lines) if line.startswith("variant "))
    return [line.split("  ")[0].strip() for line in lines[first + 1 : -1]]


def test_bench_of_text_has_a_line_for_each_objective(data_path, monkeypatch, capsys):
    lines = run_bench(monkeypatch, capsys, *flags_of(data_path))
    of_text = [name for name, objective in OBJECTIVES.items() if not objective.needs_pairs]
    assert names_of(lines) == ["off", *of_text, "off again"]
    assert any(line.startswith("matmul peak: ") for line in lines)


def test_bench_of_pairs_has_a_line_for_each_objective(folders, monkeypatch, capsys):
    lines = run_bench(monkeypatch, capsys, *flags_of(folders["pairs"]))
    assert names_of(lines) == [
        "no term packed",
        "no term padded",
        "span packed",
        "pair packed",
        "pair padded",
    ]


def test_bench_of_fine_tuning_has_packed_and_padded_lines(finetuning, monkeypatch, capsys):
    flags = ["--finetune", *finetuning, "--predictors=1"]
    lines = run_bench(monkeypatch, capsys, *flags)
    assert names_of(lines) == ["packed", "no term", "padded", "padded to 256"]


@pytest.mark.slow
def test_bench_compares_compiled_and_eager(data_path, monkeypatch, capsys):
    lines = run_bench(monkeypatch, capsys, *flags_of(data_path, compile=1))
    assert names_of(lines)[-1] == "eager"


@pytest.mark.slow
def test_bench_compiles_packed_and_padded_steps(folders, monkeypatch, capsys):
    lines = run_bench(monkeypatch, capsys, *flags_of(folders["pairs"], compile=1))
    assert "pair padded" in names_of(lines)
