"""The Trainer of transformers, with the loss gamma * CE + lbd * term over packed examples.

CE and the term are sums over the labels and pairs of a step, of all its micro-batches and
processes, divided by their number. The trainer has an objective, and never asks which.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from transformers import Trainer

from nanojepa.files import one_line
from nanojepa.hf.batches import Packer, count_pairs
from nanojepa.hf.export import UNFINISHED, publish_checkpoint
from nanojepa.hf.model import FLEX, Sums
from nanojepa.hf.settings import DTYPES
from nanojepa.objectives.objective import divide_weights, sum_weights
from nanojepa.objectives.schedule import keeps_term

# What libraries raise if a file can't be written: those of torch and safetensors have their own.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
EVAL_WINDOW = 256  # examples that are packed together in evaluation


class Counts(NamedTuple):
    """Of a step, over all processes."""

    labels: torch.Tensor  # 0-dim, at least 1
    weights: torch.Tensor  # (terms,): the sum of each term's weights


class Costs(NamedTuple):
    """FLOPs, forward and backward."""

    token: int  # of the network, for each token
    label: int  # of the head, for each label
    pair: int  # of attention, for each pair of tokens of one row


def keep_precision(accelerator):
    """Let FSDP2 sum gradients in float32, and leave the losses as they are computed.

    accelerate would do both in the dtype of the computation.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = plugin and plugin.mixed_precision_policy
    if policy:
        plugin.mixed_precision_policy = replace(
            policy, reduce_dtype=torch.float32, output_dtype=None
        )


def count(batch):
    """(1 + terms,): the labels of a Batch, and the sum of each term's weights, if there are any."""
    labels = (batch.targets >= 0).sum().float()[None]
    return labels if batch.drawn is None else torch.cat((labels, sum_weights(batch.drawn)))


class JepaTrainer(Trainer):
    """A Trainer whose data are Examples, and whose model returns Sums of Batches."""

    def __init__(self, cfg, chat, objective, **arguments):
        super().__init__(data_collator=list, **arguments)
        keep_precision(self.accelerator)
        self.cfg, self.chat, self.objective = cfg, chat, objective
        self.loss_is_scaled_for_ga = True  # by compute_loss, with the step's Counts
        flex = self.model.config._attn_implementation == FLEX
        examples = [*self.train_dataset, *(self.eval_dataset or ())]
        filler = chat.tokenizer.eos_token_id
        self.packer = Packer(cfg, objective, filler, examples, multiple=128 if flex else 64)
        self.costs = unit_flops(self.model)
        self.eval_seconds = 0.0
        self.start_log_line()

    def start_log_line(self):
        """Begin the sums over the steps of a log line: of CE and the term, and of their steps."""
        self.losses = torch.zeros(2, device=self.args.device)
        self.steps = self.steps_with_term = 0

    # ---- batches

    def of_all_processes(self, numbers):
        """Each process's list of numbers, (processes, numbers) on the host."""
        numbers = torch.tensor([numbers])
        if self.args.world_size == 1:
            return numbers
        return self.accelerator.gather(numbers.to(self.args.device)).cpu()

    def largest(self, number):
        """The largest of the processes' numbers."""
        return int(self.of_all_processes([number]).max())

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The Batches of a step, and its Counts.

        The Trainer expects num_batches items, and steps after the last: that one holds all Batches.
        """
        cfg, step = self.cfg, self.state.global_step
        term = keeps_term(cfg.general.finetune_seed, step, cfg.ratio)
        self.steps += 1
        self.steps_with_term += term
        chunks = list(itertools.islice(epoch_iterator, num_batches))
        # The pairs of a step are numbered as one process would meet them, so that what is drawn
        # for a pair doesn't depend on the number of processes.
        # (chunks, processes)
        counts = self.of_all_processes([count_pairs(chunk) for chunk in chunks]).T
        ends = counts.flatten().cumsum(0).view(counts.shape)
        first = (ends - counts)[:, self.args.process_index].tolist()
        total = max(1, int(counts.sum()))
        batches = self.packer.split(chunks, first, term, step, total, self.largest)
        if cfg.training.track_flop and step < 10:
            flops = self.floating_point_ops(batches)
            print(f"step {step + 1}: {flops:.4g} FLOPs on this process", flush=True)
        own = torch.stack([count(batch) for batch in batches]).sum(0).to(device)
        labels, *weights = self.accelerator.gather(own[None]).sum(0)
        counts = Counts(labels.clamp(min=1), weights and torch.stack(weights))
        return [[]] * (len(chunks) - 1) + [batches], counts

    def training_step(self, model, batches, num_items_in_batch=None):
        """Forward and backward of these Batches; gradients are summed over processes at the last.

        Where weights are sharded, they are summed after each.
        """
        loss = torch.zeros((), device=self.args.device)
        for batch in batches:
            if batch is batches[-1] or self.cfg.training.fsdp:
                summed = contextlib.nullcontext()
            else:
                summed = self.accelerator.no_sync(model)
            with summed:
                loss += super().training_step(model, batch, num_items_in_batch)
        return loss

    def _prepare_inputs(self, inputs):
        return inputs.to(self.args.device)

    # ---- a step

    def sums(self, model, batch):
        """The Sums of a Batch that is on the device."""
        dtype = DTYPES[self.cfg.training.dtype]
        with torch.autocast(batch.idx.device.type, dtype, enabled=dtype != torch.float32):
            return Sums(*model(batch=batch))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """This Batch's part of the step's loss, times the processes, which average gradients."""
        t, (labels, weights) = self.cfg.training, num_items_in_batch
        if inputs.drawn is not None:
            inputs = replace(inputs, drawn=divide_weights(inputs.drawn, weights))
        ce, term = self.sums(model, inputs)
        ce = ce / labels
        self.losses += torch.stack((ce.detach(), term.detach()))
        return (t.gamma * ce + t.lbd * term) * self.args.world_size

    # ---- evaluation and the log

    def _evaluate(self, *arguments):
        """As the Trainer's, but the last evaluation is left until the weights are on the disk."""
        return {} if self.control.should_training_stop else super()._evaluate(*arguments)

    def eval_batches(self, examples):
        """All Batches of these examples, the same on every process."""
        keeps = self.packer.keeps_chunks
        size = self.args.per_device_eval_batch_size if keeps else EVAL_WINDOW
        batches = []
        for step, n in enumerate(range(0, len(examples), size)):
            chunk = examples[n : n + size]
            batches += self.packer.split([chunk], [0], True, step, max(1, count_pairs(chunk)))
        return batches

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """{"eval_loss": CE a label, "eval_jepa_loss": the term a pair} over the eval examples."""
        began, model, was_training = time.perf_counter(), self.model_wrapped, self.model.training
        batches = self.eval_batches(eval_dataset or self.eval_dataset)
        labels, *weights = torch.stack([count(batch) for batch in batches]).sum(0)
        if weights:
            for batch in batches:
                batch.drawn = divide_weights(batch.drawn, torch.stack(weights))
        rank, world_size = self.args.process_index, self.args.world_size
        totals = torch.zeros(2, device=self.args.device)
        model.eval()
        # Sharded weights need as many forward passes on every process, so some repeat one.
        for n in range(rank, len(batches) + -len(batches) % world_size, world_size):
            batch = self._prepare_inputs(batches[n % len(batches)])
            sums = torch.stack(self.sums(model, batch))
            if n < len(batches):
                totals += sums
        ce, term = self.accelerator.reduce(totals, "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": ce / labels.item()}
        if any(weights):
            metrics[f"{metric_key_prefix}_jepa_loss"] = term
        model.train(was_training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self.eval_seconds += time.perf_counter() - began
        return metrics

    def log(self, logs, start_time=None):
        """As the Trainer's, with both parts of a training loss, unweighted, and metrics.jsonl.

        A step without the term counts for CE alone.
        """
        if "loss" in logs:
            ce, term = self.accelerator.reduce(self.losses, "sum").tolist()
            logs["ce_loss"] = ce / max(1, self.steps)
            if self.steps_with_term:
                logs["jepa_loss"] = term / self.steps_with_term
            self.start_log_line()
        super().log(logs, start_time)
        if self.is_world_process_zero():
            with open(Path(self.args.output_dir) / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({**logs, "step": self.state.global_step}) + "\n")

    # ---- checkpoints

    def _get_output_dir(self, trial):
        """Where the Trainer writes checkpoints, until they are whole."""
        return os.path.join(self.args.output_dir, UNFINISHED)

    def _save_checkpoint(self, model, trial):
        """As the Trainer's, but the checkpoint appears only when every process has written it.

        One that can't be written, as on a full disk, doesn't end the run.
        """
        folder, part = Path(self.args.output_dir), Path(self._get_output_dir(trial))
        first, fault = self.is_world_process_zero(), None
        if first:
            shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        except WRITE_ERRORS as e:
            fault = e
        faults = torch.tensor([fault is not None], device=self.args.device)
        if not self.accelerator.gather(faults).any() and first:
            try:
                publish_checkpoint(folder, self.state.global_step, self.args.save_total_limit)
            except OSError as e:
                fault = e
        if fault:
            shutil.rmtree(part, ignore_errors=True)
            print(
                f"warning: no checkpoint at step {self.state.global_step} ({one_line(fault)}); "
                "the run goes on",
                flush=True,
            )

    # ---- FLOPs

    def floating_point_ops(self, batches):
        """FLOPs, forward and backward, of Batches, their padding counted."""
        return count_flops(self.costs, batches, self.objective)

    def limit_flops(self):
        """Make as many steps as cost what the epochs cost without the term; returns a line on it.

        A step's cost is measured on the layouts of up to 50 steps.
        """
        args, data = self.args, self.train_dataset
        size = args.per_device_train_batch_size
        step = size * args.gradient_accumulation_steps
        plain = full = 0
        for n in range(0, min(len(data), 50 * step), step):
            chunks = [data[m : m + size] for m in range(n, min(n + step, len(data)), size)]
            numbers = [0] * len(chunks)
            plain += self.floating_point_ops(self.packer.split(chunks, numbers, False, 0, 1))
            full += self.floating_point_ops(self.packer.split(chunks, numbers, True, 0, len(data)))
        cost = (self.cfg.ratio * full + (1 - self.cfg.ratio) * plain) / plain
        steps = int(math.ceil(len(data) / (step * args.world_size)) * args.num_train_epochs)
        args.max_steps = max(1, int(steps / cost))
        return (
            f"same_flop: a step costs {cost:.3f} of one without the term: "
            f"{args.max_steps} steps instead of {steps}"
        )


def count_flops(costs, batches, objective=None):
    """FLOPs, forward and backward, of Batches, their padding counted."""
    flops = 0
    for batch in batches:
        tokens, labels = batch.idx.numel(), len(batch.labels)
        passes = heads = 1
        if batch.drawn is not None:
            passes, heads = passes + objective.more_passes, heads + objective.more_heads
        flops += passes * tokens * (costs.token + costs.pair * batch.idx.size(1))
        flops += heads * labels * costs.label
    return flops


def unit_flops(model):
    """The Costs of a model. What is computed again for the backward pass isn't counted.

    A weight takes 2 FLOPs forward, 2 for the gradient of its input, 2 for its own if it is
    trained. Attention takes 4 times the width and layer forward, 8 backward, for pairs that don't
    see each other too, as a dense mask computes them. Source: arXiv 2204.02311, appendix B.
    """

    def cost(weight):
        return weight.numel() * (4 + 2 * weight.requires_grad)

    config = model.config.get_text_config()
    # peft wraps a table of which it trains some rows.
    head, embedding = (
        getattr(table, "original_module", table).weight
        for table in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    network = sum(cost(p) for p in model.parameters() if p is not head and p is not embedding)
    attention = 12 * config.num_hidden_layers * config.hidden_size
    return Costs(network, cost(head), attention)
