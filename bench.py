"""What a training step costs here: variants are timed in turns, step by step, in one process.

    python bench.py [--rounds 20] [flags of train_gpt.py, e.g. --config configs/fineweb_124m.yaml]
    python bench.py [--rounds 20] --finetune [flags of finetune.py]

A ratio is the median over the rounds of two variants' times in one round, so a machine that
becomes slower or faster hits both alike. JEPA_LAMBDA is 0.1 if it isn't set; with COMPILE=0
nothing is compiled.

Text: whole steps. off has no term; each objective is on in turn; off again shows what noise does
to a ratio; eager is off, not compiled. The share of the peak is the matrix work of the network
(GPT.flops; the optimizer's isn't counted) over that of square products in the run's own dtype.

Pairs and groups: forward and backward of the examples of the first step, without the optimizer.
First they have no term; then each objective is on that has something to compare in them. They are
packed, or padded as fine-tuning scripts do it: each trunk and each view has a row of its own, as
long as the longest of them. TRAIN_SEQ_LEN can be chosen by it: longer rows pack better, and cost
more attention.

--finetune: forward and backward of a micro-batch of batch_size examples, without the optimizer.
They are packed, or padded to the longest document and to max_length, with the hidden states of
all layers and logits everywhere, as fine-tuning scripts have them.
"""

import argparse
import os
import statistics
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

import train_gpt
from nanojepa.batches import divide_batch, draw_step, open_data
from nanojepa.device import Clock, start_process
from nanojepa.files import one_line_errors, progress
from nanojepa.objectives import OBJECTIVES, StepRandom
from nanojepa.packing import Item, fill_rows
from nanojepa.settings import load_settings

PEAK_SECONDS = 0.02  # a product that takes so long shows what the hardware can do

# ---------------------------------------------------------------------------------- measuring


class Cost(NamedTuple):
    seconds: list  # in each round
    memory: int  # bytes at the peak


def measure(steps, rounds, device, persistent, after_round=None):
    """The Cost of each of these steps, {name: step}; step(n) computes the n-th one.

    persistent: see peak_memory. after_round: called after every round.
    """
    for step in progress(steps.values(), "compiling and warming up"):
        step(0)
        step(1)
    seconds = {name: [] for name in steps}
    for n in progress(range(rounds), "rounds"):
        # In every second round the order is reversed: no variant always follows another.
        for name in list(steps)[:: -1 if n % 2 else 1]:
            seconds[name].append(timed(partial(steps[name], n), device))
        if after_round is not None:
            after_round()
    return {
        name: Cost(seconds[name], peak_memory(partial(step, 0), device, persistent))
        for name, step in steps.items()
    }


def print_table(costs, unit, units, column, values):
    """Print a line for each variant, and as the last line the ratios of their times to the first.

    units: how many tokens or examples (unit) a step has. values: {name: text} of one more column.
    """
    base, width, times = next(iter(costs)), max(map(len, costs)), []
    print(
        f"{'variant':{width}} {'ms/step':>10} {unit + '/s':>12} {column:>15} {'memory MB':>10}   "
        f"time and memory over {base}"
    )
    for name, (seconds, memory) in costs.items():
        rounds = zip(seconds, costs[base].seconds, strict=True)
        time = f"{statistics.median(own / other for own, other in rounds):.3f}x"
        times.append(f"{name} {time}")
        typical = statistics.median(seconds)
        print(
            f"{name:{width}} {1000 * typical:10.1f} {units / typical:12.1f} {values[name]:>15} "
            f"{memory / 2**20:10.1f}   {time} {memory / costs[base].memory:.3f}x"
        )
    print(f"result: time over {base}: {', '.join(times[1:])}")


def timed(compute, device):
    """The seconds that compute() takes, the device's work included."""
    clock = Clock(device)
    clock.start()
    compute()
    clock.stop()
    return clock.passed


def peak_memory(compute, device, persistent):
    """The most bytes that tensors take while compute() runs.

    CUDA counts them. On a CPU the profiler records what is allocated and freed; persistent is what
    was allocated before.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        compute()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        compute()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return persistent + peak


def size_of(tensors):
    return sum(tensor.nbytes for tensor in tensors)


class MatmulPeak:
    """The best FLOP/s of square products in one dtype, `flops`; measure() tries once more.

    The size is doubled until a product takes PEAK_SECONDS. So a dtype that the CPU emulates takes
    no longer than another: about a second in all.
    """

    def __init__(self, dtype, device):
        self.device, self.size, self.flops, seconds = device, 64, 0.0, 0.0
        while seconds < PEAK_SECONDS and self.size < 8192:
            self.size *= 2
            self.factors = torch.randn(2, self.size, self.size, device=device).to(dtype)
            self.measure()  # the first product may load a kernel
            seconds = self.measure()

    def measure(self):
        """The seconds of one product."""
        seconds = timed(partial(torch.matmul, *self.factors), self.device)
        self.flops = max(self.flops, 2 * self.size**3 / seconds)
        return seconds


# -------------------------------------------------------------------------------- pretraining


def bench_pretraining(argv, rounds):
    """Time the steps of train_gpt.py and print the table."""
    cfg, _, warnings = load_settings(train_gpt.Config, argv, os.environ)
    rank, world_size, device = start_process()
    cfg = replace(cfg, jepa_lambda=cfg.jepa_lambda or 0.1)
    data = open_data(cfg)
    share = divide_batch(cfg, rank, world_size, device, data.least_micro_batches)
    run = train_gpt.build_run(cfg, data, share)
    if cfg.compile:
        # Every objective and every length of a row is one more graph of the same function.
        torch._dynamo.config.recompile_limit = 100
        run = train_gpt.compiled(run)
    for line in [*warnings, *data.warnings, *train_gpt.describe(run)]:
        print(line)
    print_machine(device)
    paired = hasattr(data, "examples_of")
    objectives = {
        name: train_gpt.build_objective(replace(cfg, jepa_objective=name), data, device)
        for name, kind in OBJECTIVES.items()
        if paired or not kind.needs_pairs
    }
    for objective in objectives.values():
        data.check_micro_batch(share, objective)
    if paired:
        bench_examples(run, objectives, rounds)
    else:
        bench_text(run, objectives, rounds)


def print_machine(device):
    name = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}")


def bench_text(run, objectives, rounds):
    """Time whole steps of rows of text."""
    cfg, share = run.cfg, run.share
    everything = torch.nn.ModuleList(objectives.values())
    run = replace(run, optimizers=train_gpt.build_optimizers(run.model, everything, cfg))
    off = replace(run, cfg=replace(cfg, jepa_lambda=0.0), objective=None)
    runs = {"off": off}
    runs |= {name: replace(run, objective=objective) for name, objective in objectives.items()}
    runs["off again"] = off
    if cfg.compile:
        runs["eager"] = replace(off, loss_fn=train_gpt.training_loss)
    peak = MatmulPeak(run.model.config.dtype, share.device)
    flops = train_step(off, 0).flops / share.world_size
    state = [x for o in run.optimizers for values in o.state.values() for x in values.values()]
    persistent = size_of(run.model.parameters()) + size_of(state)
    steps = {name: partial(train_step, each) for name, each in runs.items()}
    costs = measure(steps, rounds, share.device, persistent, peak.measure)
    print(f"matmul peak: {peak.flops / 1e12:.3g} TFLOP/s in {run.model.config.dtype}")
    shares = {
        name: f"{flops / statistics.median(cost.seconds) / peak.flops:.1%}"
        for name, cost in costs.items()
    }
    print_table(costs, "tokens", cfg.train_batch_tokens, "share of peak", shares)


def train_step(run, n):
    jepa_lambda = None if run.objective is None else run.cfg.jepa_lambda
    return train_gpt.training_step(run, n, 0.0, jepa_lambda)


def bench_examples(run, objectives, rounds):
    """Time forward and backward of the pairs or groups of a step, packed and padded."""
    data, steps, encoded = run.data, {}, {}
    views = [data.sets["train"].views(e) for e in data.examples_of(0)]
    for name, objective in {"no term": None, **objectives}.items():
        examples = [data.layout(v, objective) for v in views]
        if all(example.no_term for example in examples):
            continue
        layouts = {"packed": data.read(0, run.share, objective).batches}
        # Otherwise the term needs no documents that the trunks aren't.
        if objective is None or objective.needs_pairs:
            layouts["padded"] = pad_step(run, examples)
        for layout, batches in layouts.items():
            if objective is not None:
                draw_step(objective, batches, run.cfg.seed, 0)
            each = replace(run, objective=objective)
            steps[f"{name} {layout}"] = partial(forward_backward, each, batches)
            tokens = sum(batch.idx.numel() for batch in batches)
            encoded[f"{name} {layout}"] = f"{tokens / len(views):.1f}"
    costs = measure(steps, rounds, run.share.device, size_of(run.model.parameters()))
    print_table(costs, "examples", len(views), "tokens/example", encoded)


def forward_backward(run, batches, n):
    jepa_lambda = torch.tensor(run.cfg.jepa_lambda, device=run.share.device)
    for batch in batches:
        batch = batch.to(run.share.device)
        run.loss_fn(run.model, run.objective, run.cfg, batch, jepa_lambda).loss.backward()
    run.model.zero_grad()


# --------------------------------------------------------------------------------- padded rows


def alone(example):
    """The Example with each of its views in a document of its own."""
    result = example.without_term()
    for pair in example.pairs:
        result.add_pair(*(encoded_up_to(example.documents[number], at) for number, at in pair))
    return result


def encoded_up_to(document, at):
    """The tokens of a document as it lies in a row, up to a place in it."""
    if document.branch:
        return (document.trunk[: document.fork + 1] + document.branch)[: at + 1]
    return document.trunk[: at + 1]


def pad_step(run, examples):
    """A step's examples in padded Batches of one shape, about as large as its micro-batches."""
    examples = [alone(example) for example in examples]
    longest = max(len(d) for example in examples for d in example.documents)
    most = max(len(example.documents) for example in examples)
    size = max(1, run.share.micro_rows * run.cfg.train_seq_len // (longest * most))
    batches = [
        pad_rows(examples[n : n + size], run.data.doc_token, longest, size * most)
        for n in range(0, len(examples), size)
    ]
    num_targets = sum((batch.targets >= 0).sum() for batch in batches)
    for batch in batches:
        batch.num_targets = num_targets.float()
    return batches


def pad_rows(examples, filler, length=0, rows=0):
    """The Batch of Examples that alone() gave, with a row for each document.

    It has at least so many rows, of at least so many tokens.
    """
    documents = [document for example in examples for document in example.documents]
    length, rows = max(length, *map(len, documents)), max(rows, len(documents))
    items, row, first_item = [], 0, 0
    for group, example in enumerate(examples):
        places = [(row + n, 0) for n in range(len(example.documents))]
        items.append(Item(example, places, group, first_item))
        row, first_item = row + len(places), first_item + len(example.pairs)
    batch = fill_rows(items, rows, length, filler, room=rows)
    batch.total_items = max(1, first_item)
    # Causal attention needs neither: it doesn't see the padding, which follows.
    batch.positions = batch.ends = None
    return batch


# -------------------------------------------------------------------------------- fine-tuning


def bench_finetune(argv, rounds):
    """Time the micro-batches of finetune.py and print the table."""
    # transformers and peft are an extra of the package.
    from nanojepa.hf.run import make_trainer
    from nanojepa.hf.settings import ALIASES, Config

    cfg = load_settings(Config, argv, aliases=ALIASES).config
    if not cfg.objective:
        raise ValueError("training: there is no term; remove regular, or set lbd above 0")
    trainer = make_trainer(cfg)
    model, device, size = trainer.model, trainer.args.device, cfg.training.batch_size
    trainer._move_model_to_device(model, device)
    model.train()
    examples = trainer.train_dataset
    # All micro-batches have the same number of examples.
    firsts = range(0, max(1, len(examples) - size + 1), size)
    chunks = [examples[first : first + size] for first in firsts]
    sums = {"packed": partial(packed_sums, term=True), "no term": partial(packed_sums, term=False)}
    if trainer.objective.needs_pairs:
        length = cfg.dataset.max_length
        sums |= {"padded": padded_sums, f"padded to {length}": partial(padded_sums, length=length)}
    steps = {
        name: partial(finetune_step, trainer, chunks, compute) for name, compute in sums.items()
    }
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {cfg.training.dtype}")
    print_machine(device)
    costs = measure(steps, rounds, device, size_of(model.parameters()))
    print_table(costs, "examples", len(chunks[0]), "", dict.fromkeys(steps, ""))


def finetune_step(trainer, chunks, compute, n):
    """Forward and backward of a chunk; compute: returns (sum of CE, sum of the term or None)."""
    training = trainer.cfg.training
    ce, term = compute(trainer, chunks[n % len(chunks)])
    loss = training.gamma * ce
    if term is not None:
        loss = loss + training.lbd * term
    loss.backward()
    trainer.model.zero_grad()


def packed_sums(trainer, examples, term):
    """(sum of CE, sum of the term or None) of examples, as the trainer computes them."""
    batches = [batch.to(trainer.args.device) for batch in trainer.pack(examples, term)]
    ce, terms = zip(*(trainer.sums(trainer.model, batch) for batch in batches), strict=True)
    return sum(ce), sum(terms) if term else None


def padded_sums(trainer, examples, length=0):
    """The same of padded rows, as fine-tuning scripts compute them.

    length: of the rows, at least that of the longest document.
    """
    from nanojepa.hf.model import DTYPES

    batch = pad_rows([alone(example) for example in examples], trainer.filler, length)
    rng = StepRandom(0, 0, batch.items, batch.total_items)
    batch.drawn = trainer.objective.draw(batch, rng)
    batch = batch.to(trainer.args.device)
    dtype = DTYPES[trainer.cfg.training.dtype]
    with torch.autocast(batch.idx.device.type, dtype, enabled=dtype != torch.float32):
        output = trainer.model(input_ids=batch.idx, use_cache=False, output_hidden_states=True)
        logits, targets = output.logits.flatten(0, 1).float(), batch.targets.flatten()
        ce = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        states = output.hidden_states[-1]
        return ce, trainer.objective.loss(None, batch, states, batch.drawn)


@one_line_errors()
def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--rounds", type=int, default=20, help="steps of each variant (default: 20)"
    )
    parser.add_argument("--finetune", action="store_true", help="other flags are finetune.py's")
    own, flags = parser.parse_known_args()
    if own.finetune:
        bench_finetune(flags, own.rounds)
    else:
        bench_pretraining(flags, own.rounds)


if __name__ == "__main__":
    main()
