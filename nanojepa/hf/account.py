"""An account of a fine-tuning step, without the hardware: will it fit, and how long will it take.

The first step's examples are packed from the data, and the model is run on one pass of them,
forward and backward, operation by operation, on tensors without data. An operation takes the longer
of its products at the card's rate and of the bytes that it reads and writes at the card's
bandwidth. Launches and waits aren't counted.
"""

import itertools
import weakref
from dataclasses import replace
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM

from nanojepa.account import Account, attention_flops
from nanojepa.hf.batches import Packer
from nanojepa.hf.lora import add_lora
from nanojepa.hf.model import OBJECTIVE, add_losses, build_objective
from nanojepa.hf.run import optimizer_name, prepare_run
from nanojepa.hf.settings import DTYPES
from nanojepa.hf.trainer import Costs, count_flops, unit_flops


class Work(TorchDispatchMode):
    """Adds up bytes and seconds of the operations that run in it.

    It also notes when memory is taken and when it is freed.
    """

    def __init__(self, gpu):
        super().__init__()
        self.gpu, self.moved, self.seconds = gpu, 0, 0.0
        self.storages = WeakIdKeyDictionary()  # {storage: its number}
        self.events = []  # (number, bytes), negative where they are freed

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        read, written = (
            [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
            for values in ((args, kwargs), result)
        )
        if function.is_view or not written:
            return result
        flops, count = 0, flop_registry.get(function._overloadpacket)
        if "scaled_dot_product" in str(function):
            flops = attention_flops(str(function), read[0])
        elif count:
            flops = count(*args, **kwargs, out_val=result)
        moved = sum(x.nbytes for x in read + written)
        self.moved += moved
        self.seconds += max(flops / self.gpu.flops, moved / self.gpu.bandwidth)
        for x in read:
            self.storages.setdefault(x.untyped_storage(), -1)  # it was there before
        for x in written:
            self.follow(x.untyped_storage())
        return result

    def follow(self, storage):
        if storage in self.storages:
            return
        number = self.storages[storage] = len(self.events)
        self.events.append((number, storage.nbytes()))
        weakref.finalize(storage, self.events.append, (number, -storage.nbytes()))

    def peak(self, without):
        """The most bytes that were made and not yet freed, without those of some tensors."""
        left_out = {self.storages[x.untyped_storage()] for x in without}
        changes = (size for number, size in self.events if number not in left_out)
        return max(itertools.accumulate(changes))


class Pass(NamedTuple):
    """A forward and backward pass of one micro-batch, on a card that has all weights.

    parameters: how many there are; trained: how many of them are trained; block: how many the
    largest block has. costs: FLOPs, without what is computed again. kept: bytes at the peak,
    without weights and gradients.
    """

    parameters: int
    trained: int
    block: int
    costs: Costs
    kept: int
    work: Work


def account_finetune(cfg, gpu, ranks, say):
    """The Account of a step on so many cards, with weights sharded over them if training.fsdp."""
    t, shards = cfg.training, ranks if cfg.training.fsdp else 1
    ready = prepare_run(cfg, say)
    batches = first_step(cfg, ready)
    one = run_without_data(cfg, ready, batches[0], gpu, say)
    compute, weight = DTYPES[t.dtype].itemsize, 2 if t.weights == "bfloat16" else 4
    # Bytes of Adam's two numbers.
    state = 2 if "8bit" in optimizer_name(t.optimizer, cuda=True) else 8
    frozen, apart = one.parameters - one.trained, (shards - 1) / shards
    # Weights are gathered forward and backward, and gradients scattered in float32, in each pass.
    sent = (2 * compute * one.parameters + 4 * one.trained) * apart
    summed = 0 if shards > 1 else 2 * 4 * one.trained * (ranks - 1) / ranks
    update = one.trained / shards * (3 * weight + 2 * state)
    return Account(
        parameters=one.parameters,
        tokens=sum(batch.idx.numel() for batch in batches) * ranks,
        flops=count_flops(one.costs, batches, ready.objective),
        moved=one.work.moved,
        memory={
            "weights": (weight * one.trained + compute * frozen) / shards,
            "gradients": weight * one.trained / shards,
            "optimizer": state * one.trained / shards,
            "gathered weights of two blocks": 2 * compute * one.block * (shards > 1),
            "activations and temporary": one.kept,
        },
        seconds={
            "passes": len(batches) * max(one.work.seconds, sent / gpu.link),
            "gradients over ranks": summed / gpu.link,
            "optimizer": update / gpu.bandwidth,
        },
    )


def first_step(cfg, ready):
    """The Batches of a process's first examples."""
    t, examples = cfg.training, ready.prepared["train"].examples
    packer = Packer(cfg, ready.objective, ready.base.tokenizer.eos_token_id, examples, 64)
    step = examples[: t.batch_size * t.grad_accum]
    chunks = [step[n : n + t.batch_size] for n in range(0, len(step), t.batch_size)]
    return packer.split(chunks, [0] * len(chunks), True, 0, len(step))


def run_without_data(cfg, ready, batch, gpu, say):
    """The Pass of this Batch. Sharded weights are gathered in the dtype of the computation."""
    m, t = cfg.model, cfg.training
    compute = DTYPES[t.dtype]
    low = m.use_lora or t.fsdp or t.weights == "bfloat16"
    with FakeTensorMode() as fake:
        options = {"dtype": compute if low else torch.float32, "attn_implementation": "sdpa"}
        model = AutoModelForCausalLM.from_config(ready.base.config, **options)
        size = 1 + max(ready.base.tokenizer.get_vocab().values())
        if size > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(size, mean_resizing=False)
        add_losses(model, build_objective(cfg, ready.base.config, ready.base.preds, m.name))
        if cfg.recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if m.use_lora:
            # Parameters without data can't be moved, and needn't be.
            with patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):
                model = add_lora(model, m, sorted(ready.base.preds), OBJECTIVE, say)
        model.train()
        batch = without_data(batch, fake)
        work = Work(gpu)
        with work, torch.autocast("cpu", compute, enabled=compute != torch.float32):
            sums = model(batch=batch)
            (sums.ce + sums.term).backward()
    sizes = {p: p.numel() for p in model.parameters()}
    trained = [p for p in sizes if p.requires_grad]
    blocks = model.get_decoder().layers
    return Pass(
        sum(sizes.values()),
        sum(sizes[p] for p in trained),
        max(sum(p.numel() for p in block.parameters()) for block in blocks),
        unit_flops(model),
        work.peak(without=[p.grad for p in trained]),
        work,
    )


def without_data(batch, fake):
    """The Batch on tensors of a FakeTensorMode."""

    def convert(x):
        return fake.from_tensor(x) if isinstance(x, torch.Tensor) else x

    moved = batch.to(torch.device("cpu"))
    drawn = moved.drawn and {name: convert(x) for name, x in moved.drawn.items()}
    return replace(moved, **{n: convert(x) for n, x in vars(moved).items()} | {"drawn": drawn})
