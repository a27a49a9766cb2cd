"""bench.py runs, interleaves, and counts FLOPs and memory as it says."""
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import train_gpt
from conftest import ROOT, TINY
from test_model import small_gpt
from test_pairs import assert_gradient, make_model, open_pairs


def test_flops_match_torch_s_counter():
    """torch counts attention as the full square and each product of the written-out network; ours
    counts the pairs that a query sees, here given as all."""
    model, T = small_gpt(vocab_size=64, num_kv_heads=4), 16
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.zeros(2, T, dtype=torch.long), torch.zeros(2, T, dtype=torch.long)).backward()
    # the first block's inputs need no gradient only where they are data; here the embedding does: nothing is left out
    assert counter.get_total_flops() == model.flops(2 * T, 2 * T * T)


def test_peak_memory_sees_a_large_tensor():
    peak = bench.peak_memory(lambda: torch.ones(1000, 1000).add(1).sum(), torch.device("cpu"), persistent=7)
    assert 7 + 8_000_000 <= peak < 7 + 8_100_000


def test_bench_prints_its_table(data_path):
    settings = {**{k: v for k, v in TINY.items() if k != "compile"}, "data_path": data_path, "num_layers": 1}
    done = subprocess.run([sys.executable, str(ROOT / "bench.py"), "--rounds=3", *(f"--{k}={v}" for k, v in settings.items())],
                          capture_output=True, text=True, timeout=400, env={**os.environ})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0].strip() for line in lines[-6:-1]] == ["off", "span", "decoupled", "off again", "eager"]
    assert lines[-1].startswith("result: span/off time ") and "compiled/eager time" in lines[-1]


@pytest.mark.parametrize("changes", [{}, dict(jepa_pred_tokens=3, loss_on="target", jepa_norm=0, jepa_layer=1), dict(jepa_pred_tokens=0, jepa_distance="mse")])
@pytest.mark.parametrize("length", [32, 50])
def test_packed_step_equals_three_padded_passes(folders, changes, length):
    """The variant that bench.py times is the same objective: losses and gradients of one step."""
    cfg, data, share = open_pairs(folders["pairs"], jepa_lambda=0.7, **{"jepa_norm": 1, **changes})
    model = make_model(cfg, data)
    losses, _ = train_gpt.accumulate_gradients(model, train_gpt.training_loss, cfg, data, share, 0, 0.7)
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    views = [data.sets["train"].views(e) for e in data.examples_of(0)]
    padded = 0
    for arguments in bench.three_pass_batches(data, cfg, views, length, rows=7):
        loss, *terms = bench.three_passes(model, cfg, *arguments, 0.7)
        loss.backward()
        padded += torch.stack(terms)
    assert losses.tolist() == pytest.approx(padded.tolist(), rel=1e-5)
    for ours, p in zip(gradients, model.parameters()):
        assert_gradient(ours, p.grad)


def test_bench_of_pairs_prints_its_table(folders):
    settings = {**TINY, "compile": 0, "data_path": folders["pairs"], "num_layers": 1, "jepa_objective": "pair"}
    done = subprocess.run([sys.executable, str(ROOT / "bench.py"), "--rounds=2", *(f"--{k}={v}" for k, v in settings.items())],
                          capture_output=True, text=True, timeout=400, env={**os.environ})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split("   ")[0].strip() for line in lines[-6:-1]] == ["NTP packed", "NTP unpacked", "pair packed", "3 passes, longest", "3 passes, 512"]
    assert lines[-1].startswith("result: examples/s, packed over unpacked NTP ")
