"""What a training step costs here: variants interleaved step by step in one process, so that drift of the machine hits all alike.

    python bench.py [--rounds 20] [any flag of train_gpt.py, e.g. --config configs/fineweb_124m.yaml]

Variants: off (no JEPA term, compiled), span (with it, compiled), off again (the same as off: what noise alone does to a
ratio), eager (no term, not compiled). A ratio is the median over the rounds of the two step times in one round. The share
of the matmul peak counts the model's own matrix work (6 per weight and token, and causal attention), not the optimizer's,
over the best of interleaved large products of the same dtype, and of bfloat16. JEPA_LAMBDA is 0.1 where it isn't set.
"""
import argparse
import os
import statistics
import sys
import time

import torch

import train_gpt
from config import load_config
from model import Linear

MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}


def flops_per_token(model, T):
    """Matrix FLOPs of forward and backward per token of a row of T, attention counted causal (half the square)."""
    c = model.config
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    weights += model.embed.weight.numel() if c.tie_embeddings else 0
    return 6 * weights + 6 * c.num_layers * c.model_dim * T


def timed(f, device):
    """Seconds that f() takes, the device's work included."""
    clock = train_gpt.Clock(device)
    clock.start()
    f()
    clock.stop()
    return clock.passed


def peak_memory(step, device, persistent):
    """Peak bytes of tensors while step() runs: CUDA's own counter; on a CPU persistent, what stood before, plus the profiler's record."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return persistent + peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=20, help="steps of each variant (default: 20)")
    own, rest = parser.parse_known_args()
    try:
        cfg, _, warnings = load_config(train_gpt.Config, rest, os.environ)
        print(*warnings, sep="\n", end="\n" if warnings else "")
        rank, world_size, device = train_gpt.start_process()
        cfg.jepa_lambda = cfg.jepa_lambda or 0.1
        share = train_gpt.divide_batch(cfg, rank, world_size, device)
        data = train_gpt.open_data(cfg)
        model = train_gpt.build_model(cfg, data.vocab_size, device)
    except ValueError as e:
        raise SystemExit(f"error: {e}") from None
    compiled = torch.compile(train_gpt.training_loss, fullgraph=True, dynamic=False)
    optimizers = train_gpt.build_optimizers(model, cfg)
    variants = {"off": (compiled, None), "span": (compiled, cfg.jepa_lambda), "off again": (compiled, None), "eager": (train_gpt.training_loss, None)}

    def step(name, number):
        loss_fn, weight = variants[name]
        train_gpt.accumulate_gradients(model, loss_fn, cfg, data, share, number, weight)
        train_gpt.apply_gradients(optimizers, 0.0, cfg)

    def matmul(dtype, n=MATMUL_SIZE[device.type]):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        a @ b
        return 2 * n**3 / timed(lambda: a @ b, device)

    for name in variants:
        print(f"compiling and warming up: {name}", flush=True)
        step(name, 0)
        step(name, 1)
    seconds, peaks = {name: [] for name in variants}, {model.config.dtype: [], torch.bfloat16: []}
    began = time.perf_counter()
    for n in range(own.rounds):
        order = list(variants) if n % 2 == 0 else list(variants)[::-1]  # no variant always follows the same one
        for name in order:
            seconds[name].append(timed(lambda: step(name, n + 2), device))
        for dtype in peaks:
            peaks[dtype].append(matmul(dtype))
        left = (time.perf_counter() - began) / (n + 1) * (own.rounds - n - 1)
        print(f"round {n + 1}/{own.rounds}, {left:.0f} s left", end="\r" if sys.stdout.isatty() else "\n", flush=True)
    tensors = list(model.parameters()) + [t for o in optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t)]
    persistent = sum(t.numel() * t.element_size() for t in tensors)
    memory = {name: peak_memory(lambda: step(name, 0), device, persistent) for name in variants}

    flops = flops_per_token(model, cfg.train_seq_len) * cfg.train_batch_tokens / world_size
    peak = {dtype: max(values) for dtype, values in peaks.items()}
    ratio = lambda name, base="off": statistics.median(x / y for x, y in zip(seconds[name], seconds[base]))
    print(f"\n{sum(p.numel() for p in model.parameters()):,} parameters, {cfg.train_batch_tokens:,} tokens a step, rows of {cfg.train_seq_len}, "
          f"{model.config.dtype} on {torch.cuda.get_device_name() if device.type == 'cuda' else f'{torch.get_num_threads()} CPU threads'}, torch {torch.__version__}")
    print("matmul peak: " + ", ".join(f"{dtype} {value / 1e12:.3g} TFLOP/s" for dtype, value in peak.items()))
    print(f"{'variant':10} {'ms/step':>9} {'tokens/s':>10} {'share of peak':>14} {'of bf16 peak':>13} {'memory MB':>10} {'time/off':>9} {'memory/off':>11}")
    for name in variants:
        s = statistics.median(seconds[name])
        print(f"{name:10} {1000 * s:9.1f} {cfg.train_batch_tokens / s:10.0f} {flops / s / peak[model.config.dtype]:14.1%} "
              f"{flops / s / peak[torch.bfloat16]:13.1%} {memory[name] / 2**20:10.1f} {ratio(name):9.3f} {memory[name] / memory['off']:11.3f}")
    print(f"result: span/off time {ratio('span'):.3f} memory {memory['span'] / memory['off']:.3f}, off/off time {ratio('off again'):.3f}, "
          f"compiled/eager time {1 / ratio('eager'):.3f}")


if __name__ == "__main__":
    main()
