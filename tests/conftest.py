"""Small real data and runs: shards as data/ has them, train_gpt.py in a process of its own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # it is read once, when huggingface_hub is imported

import train_gpt
from nanojepa.batches import divide_batch, open_data
from nanojepa.records import prepare_pairs
from nanojepa.shards import prepare

ROOT = train_gpt.ROOT
CPU = torch.device("cpu")
# Small enough to compile in seconds, odd enough (GQA, three layers) to catch mix-ups.
TINY = dict(
    num_layers=3,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_mult=2,
    train_seq_len=32,
    train_batch_tokens=256,
    iterations=8,
    max_wallclock_seconds=0.0,
    train_log_every=1,
    compile=False,
    dtype="float32",
)


def texts():
    """112 documents of 1 to some 300 characters, half of them of one or two tokens, one twice."""
    sentence = "the cat säh ein Haus, and → then it ran; def f(x): return x + 1\n"
    words = sentence.split(" ")
    docs = []
    for i in range(59):
        count = 1 + (i * 7) % 40
        docs.append(" ".join(words[(i * k) % len(words)] for k in range(count)) + f" {i}")
    tiny = [f"{chr(97 + i % 26)}{i}"[: 1 + i % 3] for i in range(52)]
    mixed = [text for pair in zip(docs, tiny + docs[:7], strict=True) for text in pair]
    return mixed[:111] + docs[:1]


def make_text(folder):
    """A data folder of text with a BPE vocabulary of 300 and short documents."""
    origin = dict(source="conftest.py", licence="MIT")
    sizes = dict(val_fraction=0.2, vocab_size=300)
    return str(prepare(folder, "tiny", lambda: iter(texts() * 4), **origin, **sizes))


def make_set(folder, kind="pairs", count=40, longest=9, seed=0):
    """A data folder of random examples over the letters a-f, lengths 1..longest, some twice."""
    rng = np.random.default_rng(seed)

    def word():
        return "".join("abcdef"[i] for i in rng.integers(0, 6, rng.integers(1, longest + 1)))

    examples = []
    for _ in range(count):
        examples.append([word() for _ in range(2 if kind == "pairs" else rng.integers(2, 5))])
    examples += examples[:3]
    examples = [(n, kind, None, views) for n, views in enumerate(examples, 1)]
    prepare_pairs(folder, examples, examples[:11], source="test_pairs.py", vocab_size=258)
    return str(folder)


@pytest.fixture(scope="session")
def data_path(tmp_path_factory):
    return make_text(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Data folders of both kinds of examples."""
    base = tmp_path_factory.mktemp("pairs")
    return {kind: make_set(base / kind, kind) for kind in ("pairs", "groups")}


@pytest.fixture(autouse=True)
def deterministic():
    """What start_process sets on a CPU, for the tests that call its parts."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def run_id(request):
    """A free RUN_ID, whose folder is removed afterwards."""
    name = re.sub(r"[^\w.-]", "-", f"test-{os.getpid()}-{request.node.name[:40]}")
    yield name
    for folder in (ROOT / "logs").glob(f"{name}*"):
        shutil.rmtree(folder)


def make_config(data_path, **settings):
    return train_gpt.Config(**{**TINY, "data_path": data_path, **settings})


def make_run(data_path, rank=0, world_size=1, **settings):
    """A Run, as train_gpt builds it."""
    cfg = make_config(data_path, **settings)
    data = open_data(cfg)
    share = divide_batch(cfg, rank, world_size, CPU, data.least_micro_batches)
    return train_gpt.build_run(cfg, data, share)


def shake(run, scale=0.05):
    """Move every weight: at its zero-initialised projections, many gradients are zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(scale * torch.randn_like(p))
    return run


def add_up(run, batches, weight):
    """[cross entropy, term] of a step's micro-batches; their gradients add up in the weights."""
    sums = torch.zeros(2)
    for batch in batches:
        losses = train_gpt.training_loss(
            run.model, run.objective, run.cfg, batch, torch.tensor(weight)
        )
        losses.loss.backward()
        sums += torch.stack((losses.ce, losses.term))
    return sums.tolist()


def with_loss(run, loss_fn):
    """The Run, which calls loss_fn for training_loss."""
    original = train_gpt.training_loss
    run.compile = lambda function: loss_fn if function is original else function
    return run


def keep_gradients(run):
    """Let a step compute its gradients and leave them: its optimizers do nothing."""

    class Idle:
        param_groups = [{"params": run.parameters(), "initial_lr": 0.0}]

        def step(self):
            pass

        zero_grad = step

    run.optimizers = [Idle()]
    return run


class MemoryLog:
    """A RunLog that keeps what is written."""

    folder, wandb, sources = Path("memory"), None, {}

    def __init__(self):
        self.lines, self.rows, self.costs = [], [], []

    def line(self, text):
        self.lines.append(text)

    note = line

    def size(self, name):
        return 0

    def timer(self, what):
        return self

    def report(self, done):
        pass

    def metrics(self, step, train_time, values, more=None):
        self.rows.append((step, values))
        self.costs.append(more)

    def curve(self, name):
        return [values[name] for _, values in self.rows if name in values]


class NoCheckpoints:
    """Checkpoints that are never due, in a run that gets no signal."""

    signal, saved = 0, None

    def due(self, step, done):
        return False

    def wait(self):
        pass


def train_run(run, log=None, checkpoints=None, resumed=None):
    """Run the loop itself: a MemoryLog."""
    log = log or MemoryLog()
    train_gpt.Trainer(run, log, checkpoints or NoCheckpoints(), resumed).train()
    return log


def train_in_process(data_path, **settings):
    return train_run(make_run(data_path, **settings))


def run_cli(data_path, *flags, ranks=0, env=None, cwd=ROOT, timeout=300):
    """train_gpt.py as a user starts it, under torchrun if ranks are given; the finished process."""
    fields = train_gpt.Config.__dataclass_fields__
    clean = {k: v for k, v in os.environ.items() if k.lower() not in fields}
    settings = {**TINY, "data_path": data_path, "compile": 0}
    command = [sys.executable]
    if ranks:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [str(ROOT / "train_gpt.py"), *(f"--{k}={v}" for k, v in settings.items()), *flags]
    environment = {**clean, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )


def result_of(run_id):
    return json.loads((ROOT / "logs" / run_id / "result.json").read_text())


def metrics_of(run_id):
    return [json.loads(line) for line in open(ROOT / "logs" / run_id / "metrics.jsonl")]
