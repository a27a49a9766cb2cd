"""What a training step costs here: variants interleaved step by step in one process, so that drift of the machine hits all alike.

    python bench.py [--rounds 20] [any flag of train_gpt.py, e.g. --config configs/fineweb_124m.yaml]

Text. Variants: off (no JEPA term, compiled), span (with it, compiled), off again (the same as off: what noise alone does to a
ratio), eager (no term, not compiled). A ratio is the median over the rounds of the two step times in one round. The share
of the matmul peak counts the model's own matrix work (GPT.flops), not the optimizer's, over the best of interleaved large
products of the same dtype, and of bfloat16. JEPA_LAMBDA is 0.1 where it isn't set.

Pairs (DATA_PATH of data/pairs.py). Forward and backward of the examples of the first step, without the optimizer, all of them
compiled (or none, COMPILE=0):
packed NTP; one example a row, padded to the longest of the step; the packed pair objective; and that objective as three
passes over padded rows (trunk, Text with [PRED], Code), padded to the longest of the step and to 512 tokens, the latter on
the first 32 examples. Choose TRAIN_SEQ_LEN by it: longer rows pack better, and cost more attention.
"""
import argparse
import os
import statistics
import sys
import time

import torch

import jepa
import train_gpt
from config import load_config
from loader import Batch, PairData, open_data
from model import norm

MATMUL_SIZE = {"cuda": 8192, "cpu": 2048}


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


def three_passes(model, cfg, trunk, text, code, jepa_lambda):
    """gamma * CE + lambda * JEPA as existing fine-tuning scripts compute it: three forward passes over padded rows.

    trunk: (idx, targets, num_targets); text: (idx, index of the last [PRED]), code: (idx, index of the last token), with
    weight; rows are padded on the right, which causal attention doesn't see.
    """
    ce = model.cross_entropy(model._run_blocks(trunk[0], -1)[0], trunk[1]) / trunk[2]
    ends = []
    for idx, last in (text, code[:2]):
        h = model._run_blocks(idx, cfg.jepa_layer)[1]
        ends.append((norm(h) if cfg.jepa_norm else h)[torch.arange(len(last), device=h.device), last].float())
    if model.predictor is not None:
        ends[0] = model.predictor(ends[0])
    term = jepa.distance(*ends, cfg.jepa_distance, code[2])
    return cfg.jepa_gamma * ce + jepa_lambda * term, ce.detach(), term.detach()


def pad_rows(sequences, length, rows, value=0):
    """Token sequences as chunks of (rows, length), int64, the rest filled with value."""
    out = torch.full((-(-len(sequences) // rows) * rows, length), value)
    for i, tokens in enumerate(sequences):
        out[i, :len(tokens)] = torch.as_tensor(tokens)
    return out.split(rows)


def three_pass_batches(data, cfg, views, length, rows):
    """The arguments of three_passes for these examples, a list of chunks of `rows` rows padded to length."""
    trunks = [[data.doc_token, *text, data.separator, *code, data.doc_token] for text, code in views]
    first = [len(text) + 2 if cfg.loss_on == "target" else 1 for text, _ in views]
    targets = [[-1] * (f - 1) + t[f:] for f, t in zip(first, trunks)]
    texts, codes = [[data.doc_token, *text, *data.preds] for text, _ in views], [[data.doc_token, *code] for _, code in views]
    last = lambda sequences: pad_rows([[len(s) - 1] for s in sequences], 1, rows)
    count = torch.tensor(float(sum(t >= 0 for row in targets for t in row)))
    weights = torch.zeros(-(-len(views) // rows) * rows)
    weights[:len(views)] = 1 / len(views)
    chunks = zip(pad_rows(trunks, length, rows), pad_rows(targets, length, rows, -1), pad_rows(texts, length, rows), last(texts),
                 pad_rows(codes, length, rows), last(codes), weights.split(rows))
    return [((i, t, count), (x, ex[:, 0]), (y, ey[:, 0], w)) for i, t, x, ex, y, ey, w in chunks]


def bench_pairs(cfg, data, model, share, rounds):
    """Time and print the variants of pairs data."""
    if not data.paired or cfg.jepa_objective != "pair" or cfg.jepa_reverse or cfg.jepa_pred_position == "front" or cfg.jepa_distance == "infonce":
        raise ValueError("the padded variants are written for pairs, JEPA_OBJECTIVE=pair, [PRED] at the end, Text predicting Code, and no infonce")
    device, T, R = share.device, cfg.train_seq_len, share.micro_rows
    views = [data.sets["train"].views(e) for e in data.examples_of(0)]
    weight = torch.tensor(cfg.jepa_lambda, device=device)
    loss_fn, passes = (torch.compile(f, fullgraph=True, dynamic=False) if cfg.compile else f for f in (train_gpt.training_loss, three_passes))
    longest = max(len(text) + len(code) + 3 for text, code in views)
    longest = max(longest, max(len(text) for text, _ in views) + 1 + cfg.jepa_pred_tokens)
    rows = lambda length: max(1, R * T // length)  # micro-batches of as many tokens everywhere
    alone = [Batch(i, t, count) for (i, t, count), _, _ in three_pass_batches(data, cfg, views, longest, rows(longest))]
    variants = {"NTP packed": (loss_fn, data.load(0, share, False)[0], len(views)), "NTP unpacked": (loss_fn, alone, len(views)),
                "pair packed": (loss_fn, data.load(0, share, True)[0], len(views)),
                "3 passes, longest": (passes, three_pass_batches(data, cfg, views, longest, rows(longest)), len(views)),
                "3 passes, 512": (passes, three_pass_batches(data, cfg, views[:32], 512, rows(512)), min(32, len(views)))}

    def move(x):
        return tuple(map(move, x)) if isinstance(x, tuple) else x.to(device)

    def step(name):
        f, batches, _ = variants[name]
        for batch in batches:
            arguments = (cfg, batch.to(device), weight if batch.views else None) if f is loss_fn else (cfg, *move(batch), weight)
            f(model, *arguments)[0].backward()
        model.zero_grad()

    seconds = interleave(step, variants, rounds, device)
    tokens = {name: sum(b.idx.numel() if f is loss_fn else sum(part[0].numel() for part in b) for b in batches) for name, (f, batches, _) in variants.items()}
    trunks = sum(len(text) + len(code) + 3 for text, code in views)
    speed = lambda name: variants[name][2] / statistics.median(seconds[name])
    ratio = lambda x, y: statistics.median(b / variants[y][2] / (a / variants[x][2]) for a, b in zip(seconds[x], seconds[y]))
    print(f"\n{len(views)} examples of {trunks / len(views):.1f} trunk tokens on average, at most {longest} with [PRED], rows of {T}, micro-batches of {R} rows, "
          f"{model.config.dtype} on {device.type}, torch {torch.__version__}")
    print(f"{'variant':20} {'ms/example':>11} {'examples/s':>11} {'tokens/example':>15} {'of NTP packed':>14}")
    for name, (_, _, count) in variants.items():
        print(f"{name:20} {1000 / speed(name):11.2f} {speed(name):11.1f} {tokens[name] / count:15.1f} {1 / ratio(name, 'NTP packed'):13.2f}x")
    print(f"result: examples/s, packed over unpacked NTP {ratio('NTP packed', 'NTP unpacked'):.2f}x; pair over NTP: tokens {tokens['pair packed'] / tokens['NTP packed']:.2f}x, "
          f"time {1 / ratio('pair packed', 'NTP packed'):.2f}x; packed pair over three passes padded to {longest}: {ratio('pair packed', '3 passes, longest'):.2f}x, "
          f"to 512: {ratio('pair packed', '3 passes, 512'):.1f}x")


def interleave(step, names, rounds, device, between=lambda: None):
    """Seconds of step(name) per name and round, after two steps of each to compile and warm up."""
    for name in names:
        print(f"compiling and warming up: {name}", flush=True)
        step(name)
        step(name)
    seconds, began = {name: [] for name in names}, time.perf_counter()
    for n in range(rounds):
        order = list(names) if n % 2 == 0 else list(names)[::-1]  # no variant always follows the same one
        for name in order:
            seconds[name].append(timed(lambda: step(name), device))
        between()
        left = (time.perf_counter() - began) / (n + 1) * (rounds - n - 1)
        print(f"round {n + 1}/{rounds}, {left:.0f} s left", end="\r" if sys.stdout.isatty() else "\n", flush=True)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=20, help="steps of each variant (default: 20)")
    own, rest = parser.parse_known_args()
    try:
        cfg, _, warnings = load_config(train_gpt.Config, rest, os.environ)
        print(*warnings, sep="\n", end="\n" if warnings else "")
        rank, world_size, device = train_gpt.start_process()
        cfg.jepa_lambda = cfg.jepa_lambda or 0.1
        data = open_data(cfg)
        share = train_gpt.divide_batch(cfg, rank, world_size, device, data.least_micro_batches)
        model = train_gpt.build_model(cfg, data.vocab_size, device)
        if isinstance(data, PairData):
            return bench_pairs(cfg, data, model, share, own.rounds)
    except ValueError as e:
        raise SystemExit(f"error: {e}") from None
    compiled = torch.compile(train_gpt.training_loss, fullgraph=True, dynamic=False)
    optimizers = train_gpt.build_optimizers(model, cfg)
    variants = {"off": (compiled, None), "span": (compiled, cfg.jepa_lambda), "off again": (compiled, None), "eager": (train_gpt.training_loss, None)}

    def step(name):
        loss_fn, weight = variants[name]
        train_gpt.accumulate_gradients(model, loss_fn, cfg, data, share, len(peaks[torch.bfloat16]), weight)
        train_gpt.apply_gradients(optimizers, 0.0, cfg)

    def matmul(dtype, n=MATMUL_SIZE[device.type]):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        a @ b
        return 2 * n**3 / timed(lambda: a @ b, device)

    peaks = {model.config.dtype: [], torch.bfloat16: []}
    seconds = interleave(step, variants, own.rounds, device, lambda: [peaks[dtype].append(matmul(dtype)) for dtype in peaks])
    tensors = list(model.parameters()) + [t for o in optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t)]
    persistent = sum(t.numel() * t.element_size() for t in tensors)
    memory = {name: peak_memory(lambda: step(name), device, persistent) for name in variants}

    T = cfg.train_seq_len
    flops = model.flops(cfg.train_batch_tokens, cfg.train_batch_tokens * (T + 1) // 2) / world_size
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
