"""What a training step costs here: variants interleaved step by step in one process, so that drift of the machine hits all alike.

    python bench.py [--rounds 20] [any flag of train_gpt.py, e.g. --config configs/fineweb_124m.yaml]
    python bench.py [--rounds 20] --finetune [any flag of finetune.py, e.g. --config configs/finetune_example.yaml]

Text. Variants, compiled: off (no JEPA term), span (JEPA_UPDATE=coupled), decoupled (with its own pass over JEPA_ROWS_FRAC of the
rows, and its own optimizer), off again (the same as off: what noise alone does to a ratio); eager (no term, not compiled). A
ratio is the median over the rounds of the two step times in one round. The share of the matmul peak counts the model's own
matrix work (GPT.flops), not the optimizer's, over the best of interleaved large products of the same dtype, and of bfloat16.
JEPA_LAMBDA is 0.1 where it isn't set.

Pairs (DATA_PATH of data/pairs.py). Forward and backward of the examples of the first step, without the optimizer, all of them
compiled (or none, COMPILE=0):
packed NTP; one example a row, padded to the longest of the step; the packed pair objective; and that objective as three
passes over padded rows (trunk, Text with [PRED], Code), padded to the longest of the step and to 512 tokens, the latter on
the first 32 examples. Choose TRAIN_SEQ_LEN by it: longer rows pack better, and cost more attention.

--finetune. Forward and backward of one micro-batch of batch_size examples (pair or step), without the optimizer: packed; and as
fine-tuning scripts do it, three passes over padded rows with the hidden states of all layers and logits everywhere, padded to
the batch's longest sequence and to max_length; packed without the term. Rounds take one micro-batch after the other.
"""
import argparse
import dataclasses
import os
import statistics
import sys
import time

import torch

import jepa
import train_gpt
from config import load_config, load_sections
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


def padded_passes(trainer, examples, length):
    """(sum of CE over labels, sum of the distance over pairs) of jepa.Examples of a trunk and one pair of views, as three forward
    passes over rows padded to length (0: to the longest)."""
    model, cfg = trainer.model, trainer.cfg
    trunks, pairs = [e.documents[0] for e in examples], [e.pairs[0] for e in examples if e.pairs]
    inside = lambda d, at: (d.trunk[:d.fork + 1] + d.branch)[:at + 1] if d.branch else d.trunk[:at + 1]
    views = [[inside(e.documents[pair[side][0]], pair[side][1]) for e in examples for pair in e.pairs] for side in (0, 1)]
    longest = length or max(map(len, [d.trunk for d in trunks] + views[0] + views[1]))

    def passes(sequences):
        ids, = pad_rows(sequences, longest, len(sequences), trainer.filler)
        mask, = pad_rows([[1] * len(s) for s in sequences], longest, len(sequences))
        device = trainer.args.device
        out = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, output_hidden_states=True)
        return out.logits, out.hidden_states[-1][torch.arange(len(ids)), [len(s) - 1 for s in sequences]].float()

    logits, _ = passes([d.trunk for d in trunks])
    targets, = pad_rows([[-1] * (d.loss_on.start - 1) + d.trunk[d.loss_on.start:d.loss_on.stop] for d in trunks], longest, len(trunks), -1)
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().to(logits.device), ignore_index=-1, reduction="sum")
    if not pairs:
        return ce, ce * 0
    u, v = (passes(sequences)[1] for sequences in views)
    return ce, jepa.distance(u, v, cfg.distance, torch.ones(len(u), device=u.device))


def bench_finetune(argv, rounds):
    """Time and print the variants of fine-tuning."""
    import finetune
    cfg, _ = load_sections(finetune.Config, argv, finetune.ALIASES)
    t = cfg.training
    if not cfg.ratio or t.span or t.linear_predictor or t.infonce:
        raise ValueError("the padded variants are written for pair and step, without linear_predictor and infonce")
    trainer = finetune.make_trainer(cfg)
    trainer._move_model_to_device(trainer.model, trainer.args.device)
    examples, size, device = trainer.train_dataset, t.batch_size, trainer.args.device
    chunks = [examples[i:i + size] for i in range(0, len(examples) - size + 1, size)]
    packs = {"packed": True, "packed, no term": False}
    variants = {**packs, "3 passes, longest": 0, f"3 passes, {cfg.dataset.max_length}": cfg.dataset.max_length}
    trainer.model.train()

    def losses(name, chunk):
        if name not in packs:
            with torch.autocast(device.type, finetune.DTYPES[t.dtype], enabled=t.dtype != "float32"):
                return padded_passes(trainer, chunk, variants[name])
        parts = [trainer.sums(trainer.model, trainer._prepare_inputs(batch)) for batch in trainer.pack(chunk, packs[name], None)]
        return sum(ce for ce, _ in parts), sum(term for _, term in parts if term is not None)

    def step(name):
        chunk = chunks[len(seen) // len(variants) % len(chunks)]
        seen.append(name)
        ce, term = losses(name, chunk)
        (t.gamma * ce + t.lbd * term).backward()
        trainer.model.zero_grad()

    seen = []
    seconds = interleave(step, variants, rounds, device)
    persistent = 2 * sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    memory = {name: peak_memory(lambda: step(name), device, persistent) for name in variants}
    ratio = lambda name: statistics.median(b / a for a, b in zip(seconds["packed"], seconds[name]))
    print(f"\n{sum(p.numel() for p in trainer.model.parameters()):,} parameters, {size} examples of {sum(len(e.documents[0].trunk) for e in examples) / len(examples):.1f} trunk "
          f"tokens, {t.dtype} on {device.type}, torch {torch.__version__}")
    print(f"{'variant':20} {'examples/s':>11} {'memory MB':>10} {'time of packed':>15}")
    for name in variants:
        print(f"{name:20} {size / statistics.median(seconds[name]):11.1f} {memory[name] / 2**20:10.1f} {ratio(name):14.2f}x")
    print(f"result: examples/s of packed over three passes padded to the longest {ratio('3 passes, longest'):.2f}x, to {cfg.dataset.max_length} "
          f"{ratio(f'3 passes, {cfg.dataset.max_length}'):.1f}x; memory of packed over them {memory['packed'] / memory['3 passes, longest']:.2f}x, "
          f"{memory['packed'] / memory[f'3 passes, {cfg.dataset.max_length}']:.2f}x; time over no term {1 / ratio('packed, no term'):.2f}x")


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
    parser.add_argument("--finetune", action="store_true", help="the other flags are finetune.py's")
    own, rest = parser.parse_known_args()
    try:
        if own.finetune:
            return bench_finetune(rest, own.rounds)
        cfg, _, warnings = load_config(train_gpt.Config, rest, os.environ)
        print(*warnings, sep="\n", end="\n" if warnings else "")
        rank, world_size, device = train_gpt.start_process()
        cfg.jepa_lambda = cfg.jepa_lambda or 0.1
        coupled, decoupled = dataclasses.replace(cfg, jepa_update="coupled"), dataclasses.replace(cfg, jepa_update="decoupled", jepa_gamma=1.0)
        data = open_data(cfg)
        share = train_gpt.divide_batch(cfg, rank, world_size, device, data.least_micro_batches)
        model = train_gpt.build_model(cfg, data.vocab_size, device)
        if isinstance(data, PairData):
            return bench_pairs(cfg, data, model, share, own.rounds)
    except ValueError as e:
        raise SystemExit(f"error: {e}") from None
    compiled = torch.compile(train_gpt.training_loss, fullgraph=True, dynamic=False)
    updates = train_gpt.build_updates(model, decoupled)
    variants = {"off": (compiled, coupled, None), "span": (compiled, coupled, cfg.jepa_lambda), "decoupled": (compiled, decoupled, cfg.jepa_lambda),
                "off again": (compiled, coupled, None), "eager": (train_gpt.training_loss, coupled, None)}

    def step(name):
        loss_fn, own, weight = variants[name]
        train_gpt.training_step(model, loss_fn, updates, own, data, share, len(peaks[torch.bfloat16]), 0.0, weight)

    def matmul(dtype, n=MATMUL_SIZE[device.type]):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        a @ b
        return 2 * n**3 / timed(lambda: a @ b, device)

    peaks = {model.config.dtype: [], torch.bfloat16: []}
    seconds = interleave(step, variants, own.rounds, device, lambda: [peaks[dtype].append(matmul(dtype)) for dtype in peaks])
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))
    weights, (state, of_term) = size(model.parameters()), [sum(size(s.values()) for o in optimizers for s in o.state.values()) for optimizers in updates]
    memory = {name: peak_memory(lambda: step(name), device, weights + state + of_term) - (of_term if name != "decoupled" else 0) for name in variants}

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
    print(f"result: span/off time {ratio('span'):.3f} memory {memory['span'] / memory['off']:.3f}, decoupled/off time {ratio('decoupled'):.3f}, off/off time {ratio('off again'):.3f}, "
          f"compiled/eager time {1 / ratio('eager'):.3f}")


if __name__ == "__main__":
    main()
