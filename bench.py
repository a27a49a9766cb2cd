"""What a training step costs here: variants are timed in turns, step by step, in one process.

    python bench.py [--rounds 20] [flags of train_gpt.py, e.g. --config configs/fineweb_124m.yaml]
    python bench.py [--rounds 20] --finetune [flags of finetune.py]
    python bench.py --account h100 [--ranks 8] [--finetune] [flags]
    python bench.py gpu                                    all of it on this GPU, in ten minutes

A ratio is the median over the rounds of two variants' times in one round, so a machine that
becomes slower or faster hits both alike.

train_gpt.py: whole steps. off has no term; each objective is on that has something to compare; off
again shows what noise does to a ratio; eager is off, not compiled. The share of the peak is the
matrix work of the network (GPT.flops; the optimizer's isn't counted) over that of square products
in the run's own dtype. JEPA_LAMBDA is 0.1 if it isn't set; with COMPILE=0 nothing is compiled.

--account: what a step would take on a card that needn't be here: memory by kind, time by part, and
the MFU that follows. It is an estimate; nanojepa/account.py and nanojepa/hf/account.py say how it
is made. Of a model, the folder's config.json and tokenizer are enough.

--finetune: forward and backward of a micro-batch of batch_size examples, without the optimizer.
They are packed, or padded to the longest document and to max_length, with the hidden states of
all layers and logits everywhere, as fine-tuning scripts have them: each document and each view has
a row of its own.
"""

import functools
import os
import statistics
import sys
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

import train_gpt
from model import GPT
from nanojepa import cards
from nanojepa.account import GB, GPUS, account_gpt, table
from nanojepa.batches import divide_batch, draw_step, open_data
from nanojepa.device import Clock, start_process
from nanojepa.files import one_line, one_line_errors, progress, script_parser
from nanojepa.muon import Muon
from nanojepa.objectives import OBJECTIVES, StepRandom
from nanojepa.objectives.objective import sum_weights
from nanojepa.packing import Document, pack_rows
from nanojepa.settings import load_settings

PEAK_SECONDS = 0.02  # a product that takes so long shows what the hardware can do

# ---------------------------------------------------------------------------------- measuring


class Cost(NamedTuple):
    seconds: list  # in each round
    memory: int  # bytes at the peak


def measure(steps, rounds, device, persistent):
    """The Cost of each of these steps, {name: step}; step(n) computes the n-th one.

    persistent: see peak_memory. A step that fails is left out, as one that doesn't fit the GPU. The
    first one must not fail, since the others are compared with it.
    """
    base = next(iter(steps))
    for name, step in progress(list(steps.items()), "compiling and warming up"):
        try:
            step(0)
            step(1)
        except RuntimeError as e:
            if name == base:
                raise
            print(f"{name}: left out: {one_line(e)}")
            del steps[name]
    graphs = count_graphs()
    seconds = {name: [] for name in steps}
    for n in progress(range(rounds), "rounds"):
        # In every second round the order is reversed: no variant always follows another.
        for name in list(steps)[:: -1 if n % 2 else 1]:
            seconds[name].append(timed(partial(steps[name], n), device))
    print(f"graphs compiled: {graphs} in the warm-up, {count_graphs() - graphs} after it")
    return {
        name: Cost(seconds[name], peak_memory(partial(step, 0), device, persistent))
        for name, step in steps.items()
    }


def count_graphs():
    """How many graphs this process has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def print_kernels(step):
    """Print the ten kernels of a step that take a GPU the most time."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step(0)
        torch.cuda.synchronize()
    print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=10))


def print_table(costs, unit, units, shares=None):
    """Print a line for each variant, and as the last line the ratios of their times to the first.

    units: how many tokens or examples (unit) a step has. shares: {name: share of the peak}.
    """
    base, width, times = next(iter(costs)), max(map(len, costs)), []
    print(
        f"{'variant':{width}} {'ms/step':>10} {unit + '/s':>12} {'memory MB':>10}   "
        f"time and memory over {base}"
    )
    for name, (seconds, memory) in costs.items():
        rounds = zip(seconds, costs[base].seconds, strict=True)
        time = f"{statistics.median(own / other for own, other in rounds):.3f}x"
        times.append(f"{name} {time}")
        typical = statistics.median(seconds)
        share = f"   {shares[name]:.1%} of the peak" if shares else ""
        print(
            f"{name:{width}} {1000 * typical:10.1f} {units / typical:12.1f} "
            f"{memory / 2**20:10.1f}   {time} {memory / costs[base].memory:.3f}x{share}"
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


def matmul_peak(dtype, device):
    """The best FLOP/s of square products in a dtype.

    The size is doubled until a product takes PEAK_SECONDS. So a dtype that the CPU emulates takes
    no longer than another: about a second in all.
    """
    size, best, seconds = 64, 0.0, 0.0
    while seconds < PEAK_SECONDS and size < 8192:
        size *= 2
        factors = torch.randn(2, size, size, device=device).to(dtype)
        for _ in range(3):  # the first product may load a kernel
            seconds = timed(partial(torch.matmul, *factors), device)
            best = max(best, 2 * size**3 / seconds)
    return best


def print_machine(device):
    name = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}")


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
        # Every objective is one more graph of the same function.
        torch._dynamo.config.recompile_limit = 100
        train_gpt.compile_run(run)
    for line in [*warnings, *train_gpt.describe(run)]:
        print(line)
    print_machine(device)
    runs = variants(run)
    steps = {name: partial(train_step, each) for name, each in runs.items()}
    steps["off"](0)  # it makes the optimizers' state
    optimizers, dtype = runs["off"].optimizers, run.model.config.dtype
    state = [x for o in optimizers for values in o.state.values() for x in values.values()]
    persistent = size_of([*run.model.parameters(), *state])
    peak = matmul_peak(dtype, device)
    costs = measure(steps, rounds, device, persistent)
    peak = max(peak, matmul_peak(dtype, device))
    if device.type == "cuda":
        print_kernels(steps["off"])
    print(f"matmul peak: {peak / 1e12:.3g} TFLOP/s in {dtype}")
    flops = {name: steps[name](0).flops / world_size for name in costs}
    shares = {name: flops[name] / statistics.median(costs[name].seconds) / peak for name in costs}
    print_table(costs, "tokens", cfg.train_batch_tokens, shares)


def variants(run):
    """{name: Run} of what is timed; all have one model, and one set of optimizers for it."""
    off = replace(run, cfg=replace(run.cfg, jepa_lambda=0.0), objective=None)
    runs = {"off": off}
    for name, objective in objectives_of(run).items():
        runs[name] = replace(run, objective=objective)
    runs["off again"] = off
    if run.cfg.compile:
        runs["eager"] = replace(off, is_compiled=False)
    if run.cfg.compile and run.share.device.type == "cuda":
        # What torch.compile offers beyond its default: is it worth a setting?
        for mode in ("reduce-overhead", "max-autotune-no-cudagraphs"):
            compile = partial(torch.compile, fullgraph=True, dynamic=False, mode=mode)
            runs[mode] = replace(off, compile=functools.cache(compile))
    shared = train_gpt.build_optimizers(run.model, None, run.cfg)
    return {
        name: replace(each, optimizers=[*own_optimizers(each), *shared])
        for name, each in runs.items()
    }


def own_optimizers(run):
    """The optimizers of an objective's own weights."""
    own = [] if run.objective is None else list(run.objective.parameters())
    cfg, dtype = run.cfg, run.model.config.dtype
    return [Muon(own, cfg.matrix_lr, cfg.muon_momentum, dtype)] if own else []


def objectives_of(run):
    """{name: Objective} of those that have something to compare in the first step."""
    cfg, data, share, found = run.cfg, run.data, run.share, {}
    paired = hasattr(data, "check_micro_batch")
    for name, kind in OBJECTIVES.items():
        if kind.needs_pairs and not paired:
            continue
        config = replace(cfg, jepa_objective=name)
        objective = train_gpt.build_objective(config, data, share.device)
        if paired:
            data.check_micro_batch(share, objective)
        batches = data.load(0, share, objective).batches
        draw_step(objective, batches, cfg.seed, 0)
        if any(sum_weights(batch.drawn).any() for batch in batches):
            found[name] = objective
    return found


def train_step(run, n):
    jepa_lambda = None if run.objective is None else run.cfg.jepa_lambda
    with torch.compiler.set_stance("default" if run.is_compiled else "force_eager"):
        return train_gpt.training_step(run, n, 0.0, jepa_lambda)


# ------------------------------------------------------------------------------------ account


def account_pretraining(argv, card, ranks):
    """The Account of a step of train_gpt.py, without the term, on so many cards."""
    cfg = load_settings(train_gpt.Config, argv, os.environ).config
    cpu = torch.device("cpu")
    share = divide_batch(cfg, 0, ranks, cpu)
    vocab_size = cfg.vocab_size or open_data(cfg).vocab_size
    config = train_gpt.gpt_config(replace(cfg, dtype="bfloat16"), vocab_size, cpu)
    micro_batches = share.rows // ranks // share.micro_rows
    make_model = partial(GPT, config)
    return account_gpt(make_model, share.micro_rows, cfg.train_seq_len, card, ranks, micro_batches)


def account_finetuning(argv, card, ranks):
    """The Account of a step of finetune.py on so many cards."""
    # transformers and peft are an extra of the package.
    from nanojepa.hf.account import account_finetune
    from nanojepa.hf.settings import ALIASES, Config

    return account_finetune(load_settings(Config, argv, aliases=ALIASES).config, card, ranks, print)


def print_account(account, name, ranks):
    """Print an Account as a table, and as the last line what it adds up to."""
    card = GPUS[name]
    print(*table(account, card), sep="\n")
    seconds, memory = sum(account.seconds.values()), sum(account.memory.values())
    fits = "" if memory < card.memory else ": does not fit"
    print(
        f"result: {ranks} x {name}: {1000 * seconds:.1f} ms a step, "
        f"{account.tokens / seconds:,.0f} tokens/s, {account.mfu(card):.0%} MFU, "
        f"{memory / GB:.1f} of {card.memory / GB:.0f} GB a rank{fits}"
    )


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
    print_table(costs, "examples", len(chunks[0]))


def finetune_step(trainer, chunks, compute, n):
    """Forward and backward of a chunk; compute: returns (sum of CE, sum of the term)."""
    training = trainer.cfg.training
    ce, term = compute(trainer, chunks[n % len(chunks)])
    (training.gamma * ce + training.lbd * term).backward()
    trainer.model.zero_grad()


def packed_sums(trainer, examples, term):
    """(sum of CE, sum of the term, 0 without) of examples, as the trainer computes them."""
    batches = trainer.packer.split([examples], [0], term, 0, len(examples))
    sums = [trainer.sums(trainer.model, batch.to(trainer.args.device)) for batch in batches]
    return tuple(map(sum, zip(*sums, strict=True)))


def padded_sums(trainer, examples, length=0):
    """The same of padded rows, as fine-tuning scripts compute them.

    length: of the rows, at least that of the longest document.
    """
    from nanojepa.hf.model import DTYPES

    batch = pad_rows(examples, trainer.packer.filler, length)
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


def pad_rows(examples, filler, length):
    """The Batch of Examples with a row for each document and for each view."""
    examples = [alone(example) for example in examples]
    length = max(length, *(len(d) for example in examples for d in example.documents))
    for example in examples:
        example.documents = [
            Document(d.trunk + [filler] * (length - len(d)), d.loss_on) for d in example.documents
        ]
    batch = pack_rows(examples, filler)
    # Causal attention needs neither: it doesn't see the padding, which follows.
    batch.positions = batch.ends = None
    return batch


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


def make_parser():
    parser = script_parser(__doc__)
    rounds = "steps of each variant (default: 20)"
    parser.add_argument("--rounds", type=int, default=20, help=rounds)
    parser.add_argument("--finetune", action="store_true", help="other flags are finetune.py's")
    parser.add_argument("--account", choices=GPUS, help="reckon a step on this card; time nothing")
    parser.add_argument("--ranks", type=int, default=1, help="cards of the account (default: 1)")
    return parser


@one_line_errors()
def main():
    if sys.argv[1:2] == ["gpu"]:
        script_parser(cards.__doc__).parse_args(sys.argv[2:])
        cards.bench_gpu()
        return
    own, flags = make_parser().parse_known_args()
    if own.account:
        account = account_finetuning if own.finetune else account_pretraining
        found = account(flags, GPUS[own.account], own.ranks)
        print_account(found, own.account, own.ranks)
        return
    bench = bench_finetune if own.finetune else bench_pretraining
    bench(flags, own.rounds)


if __name__ == "__main__":
    main()
