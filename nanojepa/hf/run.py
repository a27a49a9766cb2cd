"""Fine-tune a Hugging Face causal LM with next-token cross entropy and a JEPA term.

    python finetune.py --config configs/finetune_example.yaml     one process: a GPU, or a CPU
    torchrun --nproc_per_node 8 finetune.py --config FILE         one process a GPU

Each key of the YAML file is a flag too: --section.key, or --key if only one section has it.

This file is a run from its settings to its result. What it calls, in the order of a run:
settings.py (every key), chat.py (messages as tokens), layout.py (what an objective compares),
limits.py (what a model can be fed), model.py and lora.py (weights and losses), batches.py and
trainer.py (a step), export.py (checkpoints and the trained model).
"""

import functools
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import transformers
import yaml
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import TrainerState, TrainingArguments, set_seed

from nanojepa.device import end_rank, find_device
from nanojepa.files import check_seal, one_line_errors, shown, write_whole
from nanojepa.hf import layout
from nanojepa.hf.chat import Chat, decode
from nanojepa.hf.export import check_folder, check_room, find_checkpoint, save_model
from nanojepa.hf.limits import check_positions
from nanojepa.hf.model import (
    Base,
    CausalLM,
    build_objective,
    check_packing,
    load_model,
    pred_names,
    read_base,
)
from nanojepa.hf.settings import ALIASES, Config, Training
from nanojepa.hf.trainer import JepaTrainer
from nanojepa.objectives import Objective
from nanojepa.objectives.distance import ACROSS_PAIRS
from nanojepa.runlog import describe_machine, project_sources, start_wandb
from nanojepa.settings import as_dict, load_settings, non_defaults
from nanojepa.show import Spelling, show


@one_line_errors()
@record
def main(argv=None):
    loaded = load_settings(Config, argv, aliases=ALIASES, description=__doc__)
    if loaded.config.general.show:
        show_examples(loaded.config)
    else:
        run(loaded.config, loaded.origin)
    if dist.is_initialized():
        end_rank()


def show_examples(cfg):
    """Print what of the first examples is trained, then the counts, without loading the weights."""
    check_data(cfg.dataset)
    ready = prepare_run(cfg, functools.partial(print, file=sys.stderr))
    train = ready.prepared["train"]
    show(train.examples[: cfg.general.show], spelling(ready.base.tokenizer), print)
    counts = dict(train.counts, duplicates=ready.duplicates)
    if "eval" in ready.prepared:
        counts["eval"] = ready.prepared["eval"].counts
    print(json.dumps(counts))


def spelling(tokenizer):
    """How a tokenizer's tokens are shown."""
    return Spelling(tokenizer.convert_ids_to_tokens, functools.partial(decode, tokenizer))


def run(cfg, origin):
    """Train; returns the result, a flat dict, which is also written to result.json."""
    began, folder = time.perf_counter(), Path(cfg.training.output_dir)
    check_run(cfg, folder)
    first = os.environ.get("RANK", "0") == "0"
    say = functools.partial(print, flush=True) if first else lambda line: None
    resume = find_checkpoint(folder, cfg.training.resume, say)
    start = TrainerState()
    if resume:
        start = TrainerState.load_from_json(resume / "trainer_state.json")
    for line in non_defaults(cfg, origin):
        say(line)
    if find_device().type == "cpu":
        torch.use_deterministic_algorithms(True)  # a run resumed is the run uninterrupted
    if first:
        check_folder(folder)
        end_report = start_report(cfg.general, folder)
    trainer = make_trainer(cfg, say)
    check_room(trainer)
    if first:
        open_folder(folder, cfg, origin, start)
    outcome = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    save_model(trainer)
    history, steps = trainer.state.log_history, trainer.state.global_step
    evaluated = any("eval_loss" in line and line["step"] == steps for line in history)
    if trainer.eval_dataset and not evaluated:
        trainer.evaluate()
    result = {
        **summarize_losses(history, outcome.training_loss),
        "steps": steps,
        "resumed_from": start.global_step,
        "examples": len(trainer.train_dataset),
        "train_seconds": outcome.metrics["train_runtime"] - trainer.eval_seconds,
        "seconds": round(time.perf_counter() - began, 1),
        "total_flops": trainer.state.total_flos,
        "seed": cfg.general.finetune_seed,
    }
    if torch.cuda.is_available():
        result["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    if first:
        write_whole(folder / "result.json", (json.dumps(result) + "\n").encode())
        end_report()
    say(f"result: {json.dumps(result)} -> {shown(folder)}")
    return result


def check_run(cfg, folder):
    """ValueError if this run can't be started here."""
    t, cuda = cfg.training, torch.cuda.is_available()
    check_data(cfg.dataset)
    if t.fsdp and not cuda:
        raise ValueError("training.fsdp: needs CUDA; leave it out")
    if t.dtype == "fp16" and not cuda:
        raise ValueError("training.dtype=fp16: needs CUDA; choose bf16 or float32")
    of_torchao = t.optimizer in ("adamw_torch_8bit", "adamw_torch_4bit")
    if of_torchao and not importlib.util.find_spec("torchao"):
        raise ValueError(f"training.optimizer={t.optimizer}: pip install torchao")
    if folder.is_dir() and folder.resolve() == Path(cfg.model.name).resolve():
        raise ValueError(f"training.output_dir={folder} is the model's own folder; choose another")
    if (folder / "result.json").exists():
        raise ValueError(
            f"training.output_dir={folder} holds a finished run; choose another, or remove it"
        )


def check_data(data):
    if bool(data.train_file) == bool(data.data_file):
        raise ValueError("give either dataset.train_file or dataset.data_file")


def open_folder(folder, cfg, origin, start):
    """Write config.yaml, environment.json and metrics.jsonl; start: the state to go on from."""
    write_whole(folder / "config.yaml", yaml.safe_dump(as_dict(cfg), sort_keys=False).encode())
    machine = describe_machine(project_sources(Path(__file__).parents[2]))
    machine |= {"transformers": transformers.__version__, "origin": origin}
    file, starts = folder / "environment.json", []
    if start.global_step and file.exists():
        starts = json.loads(file.read_bytes())
    starts.append({"step": start.global_step, **machine})
    write_whole(file, json.dumps(starts, indent=1).encode())
    # What was logged after the checkpoint will be logged again.
    lines = "".join(json.dumps(line) + "\n" for line in start.log_history)
    write_whole(folder / "metrics.jsonl", lines.encode())


def summarize_losses(history, mean_loss):
    """The mean training loss of a log, and the last value of each loss; mean_loss: without any."""
    training = [line["loss"] for line in history if "ce_loss" in line]
    losses = {"train_loss": sum(training) / len(training) if training else mean_loss}
    names = ("ce_loss", "jepa_loss", "eval_loss", "eval_jepa_loss")
    for line in history:
        losses |= {name: line[name] for name in names if name in line}
    return losses


# ---- before the weights


class Ready(NamedTuple):
    """A run before its weights are read.

    prepared: {"train": Prepared, "eval": Prepared}, the latter if there is any. duplicates: how
    many eval examples have a user's text that stands in train.
    """

    base: Base
    chat: Chat
    objective: Objective | None
    prepared: dict
    duplicates: int


def prepare_run(cfg, say):
    """The Ready of a Config; ValueError if its model, its data and its term don't go together."""
    set_seed(cfg.general.finetune_seed)
    base = read_base(cfg)
    chat = Chat(base.tokenizer, cfg.dataset.plain, cfg.dataset.date)
    objective = build_objective(cfg, base.config, base.preds, cfg.model.name)
    sources, prepared = layout.read_sources(cfg.dataset), {}
    for name, source in sources.items():
        if not source.records:
            continue
        prepared[name] = own = layout.prepare(source, chat, cfg.dataset, objective)
        say(f"{name}: {own.summary}")
        line = check_positions(base.config.get_text_config(), source.name, own.examples)
        for note in filter(None, (line, *layout.notes(source, chat))):
            say(f"{name}: {note}")
    if "train" not in prepared:
        raise ValueError("no training examples; lower dataset.eval_split")
    duplicates = layout.count_duplicates(sources["train"], sources["eval"])
    if duplicates:
        say(f"eval: {duplicates:,} of its examples have a user's text that stands in train")
    if objective is not None and all(e.no_term for e in prepared["train"].examples):
        raise ValueError(
            "no training example has a JEPA term; choose training.regular, or other data"
        )
    for line in notes(cfg, chat):
        say(line)
    return Ready(base, chat, objective, prepared, duplicates)


def notes(cfg, chat):
    """What a user may not expect of these settings, line by line."""
    t = cfg.training
    if chat.prompt_differs:
        yield (
            "the template's generation prompt is not what precedes the assistant's text in a "
            "conversation; generate from the latter, as evaluate.py does"
        )
    if chat.clock.read:
        yield f"the chat template writes the date: dataset.date={cfg.dataset.date} on every day"
    if t.memory_efficient and cfg.distance in ACROSS_PAIRS:
        yield (
            f"memory_efficient: {cfg.distance} needs a micro-batch's views at once, so it stays "
            "whole"
        )
    if t.optimizer != (name := optimizer_name(t.optimizer)):
        yield f"optimizer: {name}, since {t.optimizer} needs CUDA and bitsandbytes"


# ---- a trainer


def make_trainer(cfg, say=print):
    """The JepaTrainer of a Config, with its model and its packed examples."""
    check_seal(cfg.model.name)
    ready = prepare_run(cfg, say)
    examples = {name: prepared.examples for name, prepared in ready.prepared.items()}
    if cfg.general.debug:
        show(examples["train"][:2], spelling(ready.base.tokenizer), say)
    trainer = JepaTrainer(
        cfg,
        ready.chat,
        ready.objective,
        model=load_model(cfg, ready.base, ready.objective, say),
        args=training_arguments(cfg, "eval" in examples),
        train_dataset=examples["train"],
        eval_dataset=examples.get("eval"),
        processing_class=ready.base.tokenizer,
    )
    if cfg.training.same_flop and ready.objective is not None:
        say(trainer.limit_flops())
    return trainer


def optimizer_name(name, cuda=None):
    """The optimizer, or one that runs here; cuda: whether there is CUDA, by default as here."""
    if name.startswith("adamw_torch") or "8bit" not in name:
        return name
    cuda = torch.cuda.is_available() if cuda is None else cuda
    has_8bit = cuda and importlib.util.find_spec("bitsandbytes")
    return name if has_8bit else "adamw_torch_fused"


def training_arguments(cfg, evaluates):
    """The TrainingArguments of a Config."""
    g, t = cfg.general, cfg.training
    cuda = torch.cuda.is_available()
    sharding = {}
    if t.fsdp:
        sharding["fsdp"] = True
        sharding["fsdp_config"] = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "state_dict_type": "FULL_STATE_DICT",
        }
        # Or the gradients of a whole model would be kept between micro-batches on each card.
        accumulation = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
        sharding["accelerator_config"] = accumulation
    args = TrainingArguments(
        output_dir=t.output_dir,
        per_device_train_batch_size=t.batch_size,
        per_device_eval_batch_size=t.batch_size,
        gradient_accumulation_steps=t.grad_accum,
        learning_rate=t.learning_rate,
        num_train_epochs=t.num_epochs,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=t.eval_steps,
        save_strategy="steps" if t.save_steps else "epoch",
        save_steps=t.save_steps or 500,
        save_total_limit=t.save_total_limit,
        logging_steps=t.logging_steps,
        logging_nan_inf_filter=False,  # it waits for the device in every micro-batch
        bf16=t.dtype == "bf16",
        fp16=t.dtype == "fp16",
        optim=optimizer_name(t.optimizer),
        optim_args="bf16_stochastic_round=True" if t.weights == "bfloat16" else None,
        seed=g.finetune_seed,
        data_seed=g.finetune_seed,
        use_cpu=find_device().type == "cpu",
        ddp_backend=None if cuda or "RANK" not in os.environ else "gloo",
        # A step that drops the term leaves the objective's weights unused.
        ddp_find_unused_parameters=0 < cfg.ratio < 1,
        remove_unused_columns=False,
        report_to=["wandb"] if g.use_wandb else [],
        run_name=g.wandb_run_name or Path(t.output_dir).name,
        **sharding,
    )
    # Without torchrun one GPU is used: the Trainer would cut a packed batch among all of them.
    args._n_gpu = min(1, args.n_gpu)
    return args


def start_report(general, folder):
    """Begin a run of Weights & Biases, if one is asked for; returns what ends it."""
    if not general.use_wandb:
        return lambda: None
    set_wandb_environment(general)
    return start_wandb(name=general.wandb_run_name or folder.name, dir=str(folder)).finish


def set_wandb_environment(general):
    """Tell Weights & Biases what the settings say."""
    values = {
        "PROJECT": general.wandb_project,
        "ENTITY": general.wandb_entity,
        "RUN_GROUP": general.wandb_group,
        "TAGS": general.wandb_tags,
        "MODE": general.wandb_mode.removeprefix("online"),  # what it does if nothing is said
    }
    os.environ.update({f"WANDB_{name}": value for name, value in values.items() if value})


# ---- a trained model's views


def views_of(model, chat, folder, records):
    """What states_of_views() needs of records: the model, an Objective, Examples, what fills rows.

    The settings are those of the run that left the model in a folder, as open_model() gives it.
    """
    cfg, tokenizer = pair_settings(folder, chat.plain), chat.tokenizer
    predictors = cfg.dataset.predictors
    check_packing(model)
    preds = tokenizer.convert_tokens_to_ids(pred_names(predictors))
    objective = build_objective(cfg, model.config, preds, folder).to(model.device).paired()
    source = layout.Source(Path(folder).name, records)
    prepared = layout.prepare(source, chat, cfg.dataset, objective)
    print(prepared.summary, flush=True)
    if line := check_positions(model.config.get_text_config(), source.name, prepared.examples):
        print(line, flush=True)
    examples = [example for example in prepared.examples if example.pairs]
    return CausalLM(model), objective, examples, tokenizer.eos_token_id


def pair_settings(folder, plain):
    """The settings of the run that left a folder, with an objective that has views of two texts.

    If it had none, the views are those of the default objective.
    """
    file, cfg = Path(folder) / "config.yaml", Config()
    if file.is_file():
        cfg = load_settings(Config, ["--config", str(file)], aliases=ALIASES).config
    if not cfg.compares_texts:
        cfg.training, cfg.dataset.predictors = Training(), 0
    cfg.dataset.plain = plain
    return cfg
