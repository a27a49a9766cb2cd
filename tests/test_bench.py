"""bench.py runs, interleaves, and counts FLOPs and memory as it says."""
import os
import subprocess
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
from conftest import ROOT, TINY
from test_model import small_gpt


def test_flops_match_torch_s_counter():
    """torch counts attention as the full square and each product of the written-out network; ours halves the square."""
    model, T = small_gpt(vocab_size=64, num_kv_heads=4), 16
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.zeros(2, T, dtype=torch.long), torch.zeros(2, T, dtype=torch.long)).backward()
    full_square = 12 * model.config.num_layers * model.config.model_dim * T
    counted = counter.get_total_flops() / (2 * T)
    # the first block's inputs need no gradient only where they are data; here the embedding does: nothing is left out
    assert counted == bench.flops_per_token(model, T) - full_square / 2 + full_square


def test_peak_memory_sees_a_large_tensor():
    peak = bench.peak_memory(lambda: torch.ones(1000, 1000).add(1).sum(), torch.device("cpu"), persistent=7)
    assert 7 + 8_000_000 <= peak < 7 + 8_100_000


def test_bench_prints_its_table(data_path):
    settings = {**{k: v for k, v in TINY.items() if k != "compile"}, "data_path": data_path, "num_layers": 1}
    done = subprocess.run([sys.executable, str(ROOT / "bench.py"), "--rounds=3", *(f"--{k}={v}" for k, v in settings.items())],
                          capture_output=True, text=True, timeout=400, env={**os.environ})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0].strip() for line in lines[-5:-1]] == ["off", "span", "off again", "eager"]
    assert lines[-1].startswith("result: span/off time ") and "compiled/eager time" in lines[-1]
