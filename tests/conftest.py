"""Small real data and runs: shards written by data/shards.py, train_gpt.py in a process of its own."""
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

import loader
import train_gpt
from data.pairs import prepare_pairs
from data.shards import prepare

ROOT = Path(train_gpt.__file__).parent
# A network small enough to compile in seconds, odd enough (GQA, odd number of layers) to catch mix-ups.
TINY = dict(num_layers=3, model_dim=32, num_heads=4, num_kv_heads=2, mlp_mult=2, train_seq_len=32, train_batch_tokens=256,
            iterations=8, max_wallclock_seconds=0.0, train_log_every=1, compile=False, dtype="float32")


def texts():
    """112 documents between 1 and some 300 characters, more than ASCII, half of them of one or two tokens, one twice."""
    words = "the cat säh ein Haus, and → then it ran; def f(x): return x + 1\n".split(" ")
    docs = [" ".join(words[(i * k) % len(words)] for k in range(1 + (i * 7) % 40)) + f" {i}" for i in range(59)]
    tiny = [f"{chr(97 + i % 26)}{i}"[:1 + i % 3] for i in range(52)]
    return [text for pair in zip(docs, tiny + docs[:7]) for text in pair][:111] + docs[:1]


@pytest.fixture(scope="session")
def data_path(tmp_path_factory):
    """A prepared data folder with a BPE vocabulary of 300 and short documents."""
    return str(prepare(tmp_path_factory.mktemp("data") / "tiny", "tiny", lambda: iter(texts() * 4), source="conftest.py",
                       licence="MIT", val_fraction=0.2, vocab_size=300))


@pytest.fixture(autouse=True)
def deterministic():
    """What start_process sets on a CPU, for the tests that call its parts."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)
    yield
    torch.use_deterministic_algorithms(False)


def make_set(folder, kind="pairs", count=40, longest=9, seed=0):
    """A data folder of random examples over the letters a-f; lengths 1..longest; a few examples stand twice."""
    rng = np.random.default_rng(seed)
    word = lambda: "".join("abcdef"[i] for i in rng.integers(0, 6, rng.integers(1, longest + 1)))
    examples = [[word() for _ in range(2 if kind == "pairs" else rng.integers(2, 5))] for _ in range(count)]
    examples = [(n, kind, None, views) for n, views in enumerate(examples + examples[:3], 1)]
    prepare_pairs(folder, examples, examples[:11], source="test_pairs.py", vocab_size=258)
    return str(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Data folders of both kinds."""
    base = tmp_path_factory.mktemp("pairs")
    return {kind: make_set(base / kind, kind) for kind in ("pairs", "groups")}


def make_config(data_path, **settings):
    return train_gpt.Config(**{**TINY, "data_path": data_path, **settings})


class MemoryLog:
    """A RunLog that keeps what is written."""
    folder, wandb = Path("memory"), None

    def __init__(self):
        self.lines, self.rows, self.costs = [], [], []

    def line(self, text):
        self.lines.append(text)

    note = line

    def size(self, name):
        return 0

    def metrics(self, step, train_time, values, more={}):
        self.rows.append((step, values))
        self.costs.append(more)

    def curve(self, name):
        return [values[name] for _, values in self.rows if name in values]


def train_in_process(cfg, loss_fn=None, warm_up=False, eval_fn=train_gpt.row_losses, log=None, checkpoints=None, resumed=None):
    """Run the loop itself with loader, step and optimizers as they are: (model, MemoryLog)."""
    data = loader.open_data(cfg)
    share = train_gpt.divide_batch(cfg, 0, 1, torch.device("cpu"), data.least_micro_batches)
    model, log = train_gpt.build_model(cfg, data.vocab_size, share.device), log or MemoryLog()
    if warm_up:
        train_gpt.warm_up(model, loss_fn, cfg, data, share)
    train_gpt.train(model, loss_fn or train_gpt.training_loss, eval_fn, cfg, data, share, log, checkpoints, resumed)
    return model, log


def run_cli(data_path, *flags, ranks=0, env=None, cwd=ROOT, timeout=300):
    """train_gpt.py as a user starts it, under torchrun where ranks are given; the finished process."""
    clean = {k: v for k, v in os.environ.items() if k.lower() not in train_gpt.Config.__dataclass_fields__}
    settings = {**TINY, "data_path": data_path, "compile": 0}
    command = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []),
               str(ROOT / "train_gpt.py"), *(f"--{k}={v}" for k, v in settings.items()), *flags]
    return subprocess.run(command, cwd=cwd, env={**clean, **(env or {})}, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def run_id(request):
    """A free RUN_ID, whose folder is removed afterwards."""
    name = re.sub(r"[^\w.-]", "-", f"test-{os.getpid()}-{request.node.name[:40]}")
    yield name
    for folder in (ROOT / "logs").glob(f"{name}*"):
        shutil.rmtree(folder)


def result_of(run_id):
    return json.loads((ROOT / "logs" / run_id / "result.json").read_text())
