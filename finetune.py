"""Fine-tune a Hugging Face causal LM with next-token cross entropy and a JEPA term: LLM-JEPA, Step-JEPA, STP (span).

    python finetune.py --config configs/finetune_example.yaml            one process: a GPU, or a CPU
    torchrun --nproc_per_node 8 finetune.py --config FILE                one process a GPU
    jepa-llm --config my-run.yaml                                        the same, where the project is installed

Each key of the YAML file is a flag too, --section.key or --key. Examples are packed as trees (jepa.py): every token is encoded
once, in one forward pass, and every view has the states it would have alone. Shapes: R rows of T tokens, D width, N views.
"""
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import sys
import time
import types
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerState, TrainingArguments, set_seed

import jepa
from chat import Chat
from config import knob, load_sections
from data.shards import progress, read_sealed, sha256_file, sync_folder, write_sealed, write_whole
from layouts import pack, prepare, read_records
from loader import span_generator
from model import tree_mask

SOURCES = ("finetune.py", "layouts.py", "chat.py", "jepa.py")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # as jepa-llm
# flags of finetune.py, finetune8bh200.py and finetune_step_jepa_adapted.py that are called otherwise here
ALIASES = {"model_name": "model.name", "lora": "model.use_lora", "seed": "general.finetune_seed", "trainall": "dataset.train_all", "wandb": "general.use_wandb"}


@dataclass
class General:
    debug: int = knob(0, "above 0, or true: show the first examples as they are trained on", 0, truth=True)
    finetune_seed: int = knob(42, "of data order, spans, dropped terms, new weights", 0)
    use_wandb: bool = knob(False, "report to Weights & Biases")
    wandb_project: str = knob("jepa-llm", "its project")
    wandb_run_name: str = knob("", "its run name; empty: output_dir's")
    wandb_entity: str = knob("", "its entity")
    wandb_group: str = knob("", "its group")
    wandb_tags: str = knob("", "its tags, separated by commas")
    wandb_mode: str = knob("online", "online, offline or disabled", choices=("online", "offline", "disabled"))


@dataclass
class Model:
    name: str = knob("meta-llama/Llama-3.2-1B-Instruct", "Hugging Face name or folder")
    use_lora: bool = knob(False, "train LoRA adapters, merged into the model in the end; frozen weights stay in dtype, so less memory")
    lora_rank: int = knob(16, "their rank; alpha is twice that, dropout 0.1", 1)
    pretrain: bool = knob(False, "start from random weights")
    cache_dir: str = knob("", "where downloaded models lie")
    trust_remote_code: bool = knob(False, "run Python code that comes with the model")
    attn_implementation: str = knob("auto", "sdpa or eager (a dense mask, T numbers a token), flex_attention (CUDA), or auto: flex_attention where model and device have it and max_length is above 1,024",
                                    choices=("auto", "sdpa", "eager", "flex_attention"))


@dataclass
class Data:
    train_file: str = knob("", "JSON-lines file of messages (or, with plain, of paraphrases), or a Hugging Face dataset with a messages column")
    eval_file: str = knob("", "the same, evaluated every eval_steps")
    data_file: str = knob("", "the same, to be split into train and eval")
    eval_split: float = knob(0.2, "share of data_file that is eval", 0, 1)
    split_seed: int = knob(42, "of that split", 0)
    max_items: int = knob(0, "training examples at most; 0: all", 0)
    max_eval_items: int = knob(0, "eval examples at most; 0: all", 0)
    config_name: str = knob("", "configuration of a Hugging Face dataset")
    train_split: str = knob("", "its split; empty: train, and for eval_file test")
    max_length: int = knob(512, "tokens a document may have; what is longer is cut, and counted", 8)
    predictors: int = knob(0, "[PRED] tokens that continue view A; each one more token an example", 0, jepa.MAX_PRED_TOKENS)
    views: str = knob("prefix", "of pairs: prefix, view A is the conversation up to the user's text, which costs nothing; standalone, each view is a conversation of its own", choices=("prefix", "standalone"))
    train_all: bool = knob(False, "cross entropy on every token, not on the assistant's alone")
    plain: bool = knob(False, "no chat template: the user's text, a line break, the assistant's, an end token")
    remove_thinking: bool = knob(True, "drop <think> and <Thought> passages and <Output>, <Answer> tags of the assistant's text")
    cache_dir: str = knob("", "where downloaded datasets lie")
    preprocess_num_proc: int = knob(0, "processes that clean texts; 0: one a core, and one for a thousand examples", 0)
    tokenize_num_proc: int = knob(0, "processes that tokenise; 0: as above", 0)
    tokenize_batch_size: int = knob(1000, "examples that one of them takes at a time", 1)


@dataclass
class Training:
    output_dir: str = knob("./checkpoints", "checkpoints, the model, config.yaml, metrics.jsonl, result.json")
    batch_size: int = knob(4, "examples a micro-batch and process", 1)
    grad_accum: int = knob(4, "micro-batches a step", 1)
    learning_rate: float = knob(2e-5, "at the start; falls linearly to 0", 0)
    num_epochs: float = knob(3.0, "epochs", 0)
    eval_steps: int = knob(10, "steps between evaluations", 1)
    save_steps: int = knob(0, "steps between checkpoints; 0: every epoch", 0)
    save_total_limit: int = knob(2, "checkpoints that are kept", 1)
    logging_steps: int = knob(1, "steps between log lines", 1)
    lbd: float = knob(0.1, "weight of the JEPA term", 0)
    gamma: float = knob(1.0, "weight of the cross entropy", 0)
    last_token: int = knob(0, "a view's state is that of this token of its turn, counted from the turn's end, -1 its last; 0: its last token of content, which depends on no template", None)
    regular: bool = knob(False, "no JEPA term")
    step_jepa: bool = knob(False, "Step 1 of the assistant's text predicts Step 2; a blank line ends a step")
    span: bool = knob(False, "a random span of user and assistant text against what surrounds it (STP)")
    front_pred: bool = knob(False, "[PRED] tokens before view A; it is encoded again for that")
    reverse_pred: bool = knob(False, "view B predicts view A")
    linear_predictor: bool = knob(False, "a trained D x D map on view A")
    jepa_l2: bool = knob(False, "distance: L2 norm, instead of 1 - cosine")
    jepa_mse: bool = knob(False, "distance: mean squared error")
    infonce: bool = knob(False, "distance: InfoNCE among the views of a micro-batch, so batch_size changes it")
    jepa_ratio: float = knob(-1.0, "chance that a step computes the term at all; -1 or 1: always", -1, 1)
    same_flop: bool = knob(False, "as many steps as cost what num_epochs cost without the term")
    track_flop: bool = knob(False, "print the FLOPs of the first ten steps")
    additive_mask: bool = knob(False, "one forward pass for all views; that is so anyway")
    memory_efficient: bool = knob(False, "one example at a time and activation checkpointing: same loss, less memory, slower")
    gradient_checkpointing: bool = knob(False, "compute activations again in the backward pass: a third more time, much less memory")
    dtype: str = knob("bf16", "of the computation: bf16, fp16 (CUDA) or float32; weights that are trained are float32", choices=tuple(DTYPES))
    optimizer: str = knob("adamw_8bit", "of TrainingArguments.optim; an 8-bit one needs CUDA and bitsandbytes, adamw_torch_fused is taken without them")
    fsdp: bool = knob(False, "shard weights, gradients and optimizer over the processes (FSDP2)")
    resume: str = knob("", "continue from this checkpoint; auto: from output_dir's newest, if there is one")


@dataclass
class Config:
    general: General = field(default_factory=General)
    model: Model = field(default_factory=Model)
    dataset: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)

    def __post_init__(self):
        t, d = self.training, self.dataset
        for names in (("regular", "step_jepa", "span"), ("jepa_l2", "jepa_mse", "infonce")):
            if sum(getattr(t, name) for name in names) > 1:
                raise ValueError(f"training: choose one of {', '.join(name for name in names if getattr(t, name))}")
        for wrong, message in (
                (not (t.jepa_ratio == -1 or 0 < t.jepa_ratio <= 1), f"training.jepa_ratio={t.jepa_ratio}: must be -1, or above 0 and at most 1"),
                (t.last_token > 0, f"training.last_token={t.last_token}: must be -1 or less, counted from the end, or 0"),
                (t.span and (d.predictors or t.front_pred or t.reverse_pred or t.last_token), "training.span: its two vectors are differences of states; "
                 "dataset.predictors, front_pred, reverse_pred and last_token belong to the other objectives"),
                (d.data_file and d.eval_file, "dataset.eval_file: data_file is split into train and eval; give train_file with it"),
                (d.data_file and d.eval_split == 1, "dataset.eval_split=1: leaves nothing to train on")):
            if wrong:
                raise ValueError(message)

    @property
    def distance(self):
        t = self.training
        return "l2" if t.jepa_l2 else "mse" if t.jepa_mse else "infonce" if t.infonce else "cosine"

    @property
    def ratio(self):
        """Share of the steps that compute the term."""
        t = self.training
        return 0.0 if t.regular or t.lbd == 0 else 1.0 if t.jepa_ratio == -1 else t.jepa_ratio


# ---- files


def seal(folder):
    """Write sha256.json, {name: sha256} of every file in a folder, when they are on the disk."""
    digests = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(file, "rb") as f:
            os.fsync(f.fileno())
            digests[file.relative_to(folder).as_posix()] = hashlib.file_digest(f, "sha256").hexdigest()
    write_sealed(folder / "sha256.json", digests)


def check_seal(folder):
    """ValueError names the file that is missing or not as its folder's sha256.json has it; without that, or of the hub, a model is taken as it is."""
    if not os.path.lexists(file := Path(folder) / "sha256.json"):
        return
    for name, digest in read_sealed(file).items():
        file = Path(folder) / name
        try:
            same = sha256_file(file) == digest
        except OSError as e:
            raise ValueError(f"{file}: cannot be read ({e.strerror}), but sha256.json beside it names it; fetch or make the folder again") from None
        if not same:
            raise ValueError(f"{file}: its sha256 is not the one in sha256.json; fetch or make the folder again, or remove that file if this one was meant "
                             "to change")


@contextlib.contextmanager
def reading(what):
    """Turn whatever a library raises about a file or folder into a ValueError of one line that names it."""
    try:
        yield
    except Exception as e:  # many kinds: no such name, no network, files cut off, an architecture unknown here
        raise ValueError(f"{what}: cannot be loaded ({' '.join(str(e).split())[:300]})") from None


def checkpoints(folder):
    """The checkpoints in a folder, oldest step first."""
    found = {int(path.name[11:]): path for path in folder.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", path.name) and path.is_dir()}
    return [found[step] for step in sorted(found)]


def checkpoint(folder, resume, say):
    """The checkpoint to continue from, or None; with auto the newest whole one."""
    there = checkpoints(folder)
    if there and not resume:
        raise ValueError(f"training.output_dir={folder} holds checkpoints; set training.resume: auto to continue, choose another, or remove it")
    if resume and resume != "auto":
        if not Path(resume).is_dir():
            raise ValueError(f"training.resume={resume}: no such folder; give a checkpoint, or auto")
        check_seal(resume)
        if not (Path(resume) / "sha256.json").exists():
            say(f"warning: {resume} has no sha256.json, so a file damaged in it may go unseen")
        return resume
    for path in reversed(there):
        try:
            if not (path / "sha256.json").exists():
                raise ValueError(f"{path}: no sha256.json, so it is not finished, or of an older version; give training.resume: {path} to take it as it is")
            check_seal(path)
            return str(path)
        except ValueError as e:
            say(f"warning: damaged checkpoint: {e}; trying the one before it")
            last = e
    if there:
        raise ValueError(f"{last}; no checkpoint of this run is whole: remove {folder} to begin again at step 0")
    return None


def step_of(checkpoint):
    """The step that a checkpoint is of."""
    with reading(file := Path(checkpoint) / "trainer_state.json"):
        step = TrainerState.load_from_json(file).global_step
        if type(step) is not int:
            raise ValueError("global_step is no whole number")
        return step


def cut_metrics(log, step):
    """Leave the lines up to this step in a metrics.jsonl: the others are done again, and a kill may have torn the last."""
    kept, lines = [], log.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(f"{log}, line {number}: not JSON with a step; remove the line") from None
    write_whole(log, *kept)


# ---- model


def load_model(cfg):
    """(model, tokenizer, ids of the [PRED] tokens); the model's forward gives logits at labels, and views."""
    m = cfg.model
    check_seal(m.name)
    options = {"cache_dir": m.cache_dir or None, "trust_remote_code": m.trust_remote_code}
    dtype = DTYPES[cfg.training.dtype] if m.use_lora and not m.pretrain else torch.float32
    with reading(f"model.name={m.name}"):
        tokenizer = AutoTokenizer.from_pretrained(m.name, **options)
        config = AutoConfig.from_pretrained(m.name, **options)
        kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
        attention = "sdpa" if getattr(kind, "_supports_sdpa", True) else "eager"
        flex = cfg.dataset.max_length > 1024 and torch.cuda.is_available() and getattr(kind, "_supports_flex_attn", False)
        if m.attn_implementation != "auto":
            flex = m.attn_implementation == "flex_attention"
            attention = attention if flex else m.attn_implementation
        options |= {"dtype": dtype, "attn_implementation": attention}
        if m.pretrain:
            options.pop("cache_dir")
            model = AutoModelForCausalLM.from_config(config, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(m.name, **options)
    check_layers(config.get_text_config(), cfg.dataset.max_length + cfg.dataset.predictors)
    model.config.use_cache = False
    preds = add_pred_tokens(tokenizer, model, cfg.dataset.predictors)
    if cfg.training.linear_predictor:
        add_predictor(model, Path(m.name) / "jepa_predictor.safetensors")
    tap_forward(model)
    check_packing(model, dtype)
    if flex:  # its masks say the same, but it is compiled for the device that trains
        model.set_attn_implementation("flex_attention")
    if (cfg.training.gradient_checkpointing or cfg.training.memory_efficient) and not cfg.training.fsdp:  # FSDP2 has its own
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if m.use_lora:
        model = add_lora(model, cfg, preds)
    return model, tokenizer, preds


def check_layers(config, length):
    """ValueError where some layer would do without its own attention pattern, which a mask of ours replaces."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds or not getattr(config, "layer_types", None) and getattr(config, "use_sliding_window", True)
    if window and slides and window < length:
        raise ValueError(f"{config.model_type} has layers with a sliding window of {window} tokens, which the tree mask would replace; lower dataset.max_length so that it and the [PRED] tokens fit")
    if other := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{config.model_type} has layers of {', '.join(sorted(other))}: they mix tokens of a row without the tree mask; choose a model of full attention")


def add_pred_tokens(tokenizer, model, count):
    """Ids of <|predictor_1|>.. in the tokenizer, those that are new with the mean of all embeddings."""
    names = [f"<|predictor_{n}|>" for n in range(1, count + 1)]
    known = tokenizer.get_vocab()
    new = [name for name in names if name not in known]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in new], special_tokens=True)
    ids, new = tokenizer.convert_tokens_to_ids(names), tokenizer.convert_tokens_to_ids(new)
    if ids and max(ids) >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if new:
        with torch.no_grad():
            for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
                table[new] = table[:min(new)].float().mean(0).to(table.dtype)
    return ids


def add_predictor(model, saved):
    """A D x D map on view A as a part of the model: the identity, or what an earlier run has saved."""
    width = model.get_output_embeddings().weight.size(1)
    model.jepa_predictor = nn.Linear(width, width, bias=False, device=model.device)
    nn.init.eye_(model.jepa_predictor.weight)
    if saved.is_file():
        with reading(saved):
            model.jepa_predictor.load_state_dict(load_file(saved))


def add_lora(model, cfg, preds):
    """The model with LoRA adapters; the embeddings of the [PRED] tokens and the predictor are trained whole."""
    from peft import LoraConfig, get_peft_model
    names = {name.rsplit(".", 1)[-1]: module for name, module in model.named_modules()}
    embedding = next(name for name, module in names.items() if module is model.get_input_embeddings())
    return get_peft_model(model, LoraConfig(
        task_type="CAUSAL_LM", r=cfg.model.lora_rank, lora_alpha=2 * cfg.model.lora_rank, lora_dropout=0.1, bias="none",
        target_modules=[name for name in LORA_TARGETS if name in names] or "all-linear",
        exclude_modules=["jepa_predictor"] if cfg.training.linear_predictor else None,
        modules_to_save=["jepa_predictor"] if cfg.training.linear_predictor else None,
        trainable_token_indices={embedding: preds} if preds else None))


def tap_forward(model):
    """Let model(..., keep=..., views=...) return (logits (1, n, V) of the kept states, view A, view B (N, D), noise floor or None).

    keep (n,), views (2, N) or (4, N): indices into the R * T states. The states are what the head gets: behind the last norm,
    as hidden_states[-1]. The head computes kept states alone, with whatever scaling the model's own forward adds.
    """
    original = model.forward

    def forward(self, *args, keep=None, views=None, **inputs):
        if keep is None:
            return original(*args, **inputs)
        states = []

        def select(head, inputs):
            states.append(inputs[0].flatten(0, 1))
            return (states[0][keep][None],)

        hook = self.get_output_embeddings().register_forward_pre_hook(select)
        try:
            logits = original(*args, use_cache=False, **{name: x for name, x in inputs.items() if x is not None}).logits  # and no view of them: FSDP2 hooks what is returned
        finally:
            hook.remove()
        if views is None:
            return logits, None, None, None
        floor = None
        if len(views) == 4:
            u, v = (x[0] for x in jepa.span_views(states[0][None], *(x[None] for x in views)))
            floor = jepa.noise_floor(states[0][None], views[1][None])[0]
        else:
            u, v = jepa.pair_views(states[0][None], *views)
        return logits, self.jepa_predictor(u) if hasattr(self, "jepa_predictor") else u, v, floor

    model.forward = types.MethodType(forward, model)


def attention_mask(model, ends, dtype):
    """What the model's attention takes for rows of trees: a BlockMask, or an additive mask (R, 1, T, T), right under sdpa and eager."""
    if model.config._attn_implementation == "flex_attention":
        return tree_mask(ends, flex=True)
    visible = tree_mask(ends, flex=False)
    return torch.zeros(visible.shape, dtype=dtype, device=ends.device).masked_fill(~visible, torch.finfo(dtype).min)


@torch.no_grad()
def check_packing(model, dtype):
    """ValueError where a packed row doesn't give each document the logits that it has alone: whatever the reason, training would go wrong."""
    tokens = torch.arange(20).tolist()
    trunk, branch, lone = tokens[:7], tokens[7:9], tokens[9:14]
    alone, training = [trunk, trunk[:4] + branch, lone], model.training
    batch = pack([jepa.Example([jepa.Document(trunk, range(1, 7), branch, 3), jepa.Document(lone, range(1, 5))])], False, 0)
    batch = {name: x.to(model.device) for name, x in batch.items()}
    model.eval()
    try:
        packed, *_ = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=attention_mask(model, batch["ends"], dtype),
                           keep=torch.arange(batch["input_ids"].numel(), device=model.device))
    except Exception as e:  # a model of another kind fails in its own way
        raise ValueError(f"{model.config.model_type} doesn't take rows with a mask and positions of their own ({' '.join(str(e).split())[:200]}); choose another model") from None
    packed = packed[0]
    rows = [packed[[0, 1, 2, 3, 6, 7, 8]], packed[:6]]
    lone_at = (batch["input_ids"].flatten() == lone[0]).nonzero()[0, 0]
    rows.append(packed[lone_at:lone_at + 5])
    for seen, row in zip(rows, alone):
        expected = model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0]
        if not (seen - expected).norm() <= (1e-3 if dtype == torch.float32 else 0.05) * expected.norm():
            raise ValueError(f"{model.config.model_type} doesn't give a packed document the logits it has alone (its attention or its positions follow "
                             "rules of their own); choose another model")
    model.train(training)


# ---- training


class JepaTrainer(Trainer):
    """gamma * CE + lbd * JEPA over packed examples; each a sum over the step's labels or pairs, of all processes, over their number."""

    def __init__(self, cfg, chat, **arguments):
        super().__init__(data_collator=list, **arguments)
        self.cfg, self.chat, self.filler, self.loss_is_scaled_for_ga = cfg, chat, chat.tokenizer.eos_token_id, True
        flex = self.model.config._attn_implementation == "flex_attention"
        # a document may be as long as max_length, and its branch comes on top
        self.rows_of = -(-(cfg.dataset.max_length + cfg.dataset.predictors + 8) // 128) * 128 if flex else 0
        self.parts = torch.zeros(2, device=self.args.device)  # (CE, JEPA) since the last log line
        self.eval_seconds = 0.0
        self.part_steps, self.flops = [0, 0], 0  # the steps that parts is about: all, and those with the term
        self.costs = unit_flops(self.model, cfg.training.gradient_checkpointing or cfg.training.memory_efficient)

    def pack(self, examples, term, generator):
        """A list of micro-batches for these examples: one, or with memory_efficient one for each of them."""
        if not term:
            examples = [e.without_term() for e in examples]
        apart = self.cfg.training.memory_efficient and self.cfg.distance != "infonce"
        batches = [pack(part, self.cfg.training.span, self.filler, generator, self.rows_of) for part in ([[e] for e in examples] if apart else [examples])]
        return batches if term else [{**batch, "views": None} for batch in batches]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, lists, and its (labels, pairs) over all processes: here the Trainer has all of a step at once."""
        cfg, step, rank = self.cfg, self.state.global_step, self.args.process_index
        term = jepa.keeps_term(cfg.general.finetune_seed, step, cfg.ratio) and cfg.ratio > 0
        self.part_steps = [self.part_steps[0] + 1, self.part_steps[1] + term]
        generator = span_generator(cfg.general.finetune_seed, step * self.args.world_size + rank)
        batches = [self.pack(examples, term, generator) for examples in itertools.islice(epoch_iterator, num_batches)]
        return batches, self.count(itertools.chain(*batches), device)

    def count(self, batches, device):
        """(labels, pairs) of these micro-batches over all processes, at least 1."""
        own = [((batch["labels"] >= 0).sum(), batch["weight"].sum() if batch["views"] is not None else 0) for batch in batches]
        return self.accelerator.gather(torch.tensor(own, dtype=torch.float, device=device).reshape(-1, 2).sum(0, keepdim=True)).sum(0).clamp(min=1)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of a micro-batch, or of its parts one by one."""
        losses = []
        for n, part in enumerate(inputs, 1):
            # FSDP2 sums sharded gradients as they come: deferring that would keep whole ones
            with contextlib.nullcontext() if n == len(inputs) or self.cfg.training.fsdp else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, num_items_in_batch))
        self.flops += self.floating_point_ops(inputs)
        if self.accelerator.sync_gradients:
            if self.cfg.training.track_flop and self.state.global_step < 10:
                print(f"step {self.state.global_step + 1}: {self.flops:.4g} FLOPs on this process", flush=True)
            self.flops = 0
        return torch.stack(losses).sum()

    def sums(self, model, inputs):
        """(sum of CE over labels, sum of the distance over pairs or None) of a micro-batch."""
        keep = (inputs["labels"].flatten() >= 0).nonzero()[:, 0]
        dtype = DTYPES[self.cfg.training.dtype]
        with torch.autocast(keep.device.type, dtype, enabled=dtype != torch.float32):
            logits, u, v, floor = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], keep=keep, views=inputs["views"],
                                        attention_mask=attention_mask(self.model, inputs["ends"], dtype))
        ce = F.cross_entropy(logits[0].float(), inputs["labels"].flatten()[keep], reduction="sum")
        return ce, None if u is None else jepa.distance(u, v, self.cfg.distance, inputs["weight"], floor, inputs["group"])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The part of the step's loss that this micro-batch is, times the number of processes, since gradients are averaged over them."""
        ce, term = self.sums(model, inputs)
        labels, pairs = num_items_in_batch
        self.parts += torch.stack((ce.detach() / labels, torch.zeros_like(ce) if term is None else term.detach() / pairs))
        t = self.cfg.training
        loss = t.gamma * ce / labels
        return (loss if term is None else loss + t.lbd * term / pairs) * self.args.world_size

    def log(self, logs, start_time=None):
        """Add the two parts, unweighted, to a line of training losses, and write all lines to metrics.jsonl."""
        if "loss" in logs:
            ce, term = self.accelerator.reduce(self.parts.clone(), "sum").tolist()
            logs |= {"ce_loss": ce / max(1, self.part_steps[0])} | ({"jepa_loss": term / self.part_steps[1]} if self.part_steps[1] else {})
            self.parts.zero_()
            self.part_steps = [0, 0]
        super().log(logs, start_time)
        if self.is_world_process_zero():
            with open(Path(self.args.output_dir) / "metrics.jsonl", "a") as f:
                f.write(json.dumps({**logs, "step": self.state.global_step}) + "\n")

    def _get_output_dir(self, trial):
        """Where the Trainer writes checkpoints, until they are whole."""
        return os.path.join(self.args.output_dir, "checkpoint.part")

    def _save_checkpoint(self, model, trial):
        """As the Trainer's; but sealed and renamed when every process has written its part, and the oldest is removed only then."""
        folder, part, step = Path(self.args.output_dir), Path(self._get_output_dir(trial)), self.state.global_step
        if self.is_world_process_zero():
            shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            whole = folder / f"checkpoint-{step}"
            seal(part / whole.name)
            shutil.rmtree(whole, ignore_errors=True)  # damaged, or of steps that are done again
            os.rename(part / whole.name, whole)
            shutil.rmtree(part, ignore_errors=True)
            sync_folder(folder)
            for old in [path for path in checkpoints(folder) if int(path.name[11:]) <= step][:-self.args.save_total_limit]:
                shutil.rmtree(old, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint):
        with reading(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """{"eval_loss": CE a label, "eval_jepa_loss"} over the eval examples, the term always computed."""
        model, examples, args, began = self.model_wrapped, eval_dataset or self.eval_dataset, self.args, time.perf_counter()
        was_training, generator, total = model.training, span_generator(self.cfg.general.finetune_seed, args.process_index), torch.zeros(4, device=args.device)
        own, size = examples[args.process_index::args.world_size], args.per_device_eval_batch_size
        model.eval()
        for first in range(0, -(-len(examples) // args.world_size), size):  # as many batches on every process, as sharded weights need
            for inputs in self.pack(own[first:first + size] or examples[:1], self.cfg.ratio > 0, generator):
                if first >= len(own):
                    inputs = {**inputs, "labels": torch.full_like(inputs["labels"], -1), "weight": inputs["weight"] * 0}
                ce, term = self.sums(model, self._prepare_inputs(inputs))
                total += torch.stack((ce, (inputs["labels"] >= 0).sum(), ce * 0 if term is None else term, inputs["weight"].sum()))
        ce, labels, term, pairs = self.accelerator.reduce(total, "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": ce / labels} | ({f"{metric_key_prefix}_jepa_loss": term / pairs} if self.cfg.ratio and pairs else {})
        model.train(was_training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.eval_seconds += time.perf_counter() - began
        return metrics

    def floating_point_ops(self, inputs):
        """FLOPs of forward and backward of micro-batches, padding counted."""
        token, label, pair = self.costs
        return sum(token * x["input_ids"].numel() + label * int((x["labels"] >= 0).sum()) + pair * x["input_ids"].numel() * x["input_ids"].size(1) for x in inputs)


def unit_flops(model, again):
    """FLOPs, forward and backward, of the network for a token, of the head for a label, of attention for a pair of tokens of a row.

    A weight takes 2 forward, 2 for the gradient of its input, 2 for its own if it is trained; again: 2 more, to compute activations
    a second time. Attention takes 4 times the width and layer forward, 8 backward, visible or not, as a dense mask computes them.
    Source: arXiv 2204.02311, appendix B.
    """
    config = model.config.get_text_config()
    head, embedding = (getattr(table, "original_module", table).weight for table in (model.get_output_embeddings(), model.get_input_embeddings()))
    cost = lambda p, again: p.numel() * (4 + 2 * p.requires_grad + 2 * again)
    network = sum(cost(p, again) for p in model.parameters() if p is not head and p is not embedding)
    return network, cost(head, False), (12 + 4 * again) * config.num_hidden_layers * config.hidden_size


def same_flop_steps(trainer, examples, steps):
    """How many steps cost what `steps` cost without the term, by the layouts of up to 200 micro-batches."""
    size, r = trainer.args.per_device_train_batch_size, trainer.cfg.ratio
    chunks = [examples[i:i + size] for i in range(0, min(len(examples), 200 * size), size)]
    plain, full = (sum(trainer.floating_point_ops(trainer.pack(chunk, term, None)) for chunk in chunks) for term in (False, True))
    return max(1, int(steps * plain / (r * full + (1 - r) * plain))), (r * full + (1 - r) * plain) / plain


def arguments(cfg, evaluates):
    """TrainingArguments of this config."""
    g, t = cfg.general, cfg.training
    if g.use_wandb:
        names = {"PROJECT": g.wandb_project, "ENTITY": g.wandb_entity, "RUN_GROUP": g.wandb_group, "TAGS": g.wandb_tags, "MODE": g.wandb_mode}
        os.environ.update({f"WANDB_{name}": value for name, value in names.items() if value})
    cuda = torch.cuda.is_available()
    fsdp = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT",
            "activation_checkpointing": t.gradient_checkpointing or t.memory_efficient}} if t.fsdp else {}
    args = TrainingArguments(
        output_dir=t.output_dir, per_device_train_batch_size=t.batch_size, per_device_eval_batch_size=t.batch_size, gradient_accumulation_steps=t.grad_accum,
        learning_rate=t.learning_rate, num_train_epochs=t.num_epochs, eval_strategy="steps" if evaluates else "no", eval_steps=t.eval_steps,
        save_strategy="steps" if t.save_steps else "epoch", save_steps=t.save_steps or 500, save_total_limit=t.save_total_limit, logging_steps=t.logging_steps,
        bf16=t.dtype == "bf16", fp16=t.dtype == "fp16", optim=optimizer_name(t.optimizer), seed=g.finetune_seed, data_seed=g.finetune_seed,
        use_cpu=not cuda, ddp_backend=None if cuda or "RANK" not in os.environ else "gloo", ddp_find_unused_parameters=t.linear_predictor and cfg.ratio < 1,
        remove_unused_columns=False, report_to=["wandb"] if g.use_wandb else [], run_name=g.wandb_run_name or Path(t.output_dir).name, **fsdp)
    args._n_gpu = min(1, args.n_gpu)  # without torchrun one GPU; the Trainer would spread a packed batch over all of them (DataParallel)
    return args


def optimizer_name(name):
    """The optimizer that is there."""
    there = torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes")
    return name if there or "8bit" not in name else "adamw_torch_fused"


def save(trainer):
    """The trained model as a folder that from_pretrained loads, adapters merged; of a sharded model with adapters these alone.

    It is written and sealed in a folder of its own, since the output folder may hold files of others, and those may change.
    """
    cfg, folder, model = trainer.cfg, Path(trainer.args.output_dir), trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model) if cfg.training.fsdp else None
    if not trainer.is_world_process_zero():
        return
    part = folder / "model.part"
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir()
    if cfg.model.use_lora and not cfg.training.fsdp:
        model = model.merge_and_unload()
    state = state or model.state_dict()
    if cfg.training.linear_predictor:
        weight = next(state.pop(name) for name in list(state) if name.endswith("jepa_predictor.weight") or "jepa_predictor.modules_to_save" in name)
        save_file({"weight": weight.contiguous()}, part / "jepa_predictor.safetensors")
        state = {name: x for name, x in state.items() if "jepa_predictor" not in name}
    model.config.use_cache, model.generation_config.eos_token_id = True, trainer.chat.stop_tokens
    model.save_pretrained(part, state_dict=state)
    trainer.processing_class.save_pretrained(part)
    shutil.copy(folder / "config.yaml", part)
    seal(part)
    for file in sorted((path for path in part.rglob("*") if path.is_file()), key=lambda path: path.name == "sha256.json"):  # the seal last
        (place := folder / file.relative_to(part)).parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    shutil.rmtree(part)
    sync_folder(folder)


def read_sets(cfg):
    """{"train": (source, records), "eval": the same, maybe without any}."""
    d = cfg.dataset
    if not d.data_file:
        return {"train": (d.train_file, read_records(d.train_file, cfg, "train", d.max_items)),
                "eval": (d.eval_file, read_records(d.eval_file, cfg, "test", d.max_eval_items) if d.eval_file else [])}
    records = read_records(d.data_file, cfg, "train", 0)
    random.Random(d.split_seed).shuffle(records)
    size = round(d.eval_split * len(records))
    return {"train": (d.data_file, records[size:][:d.max_items or None]), "eval": (d.data_file, records[:size][:d.max_eval_items or None])}


def make_trainer(cfg, say=print):
    """The JepaTrainer of a config, with model, tokenizer and packed examples; ValueError says what is wrong."""
    d, t = cfg.dataset, cfg.training
    set_seed(cfg.general.finetune_seed)
    sets = read_sets(cfg)
    model, tokenizer, preds = load_model(cfg)
    chat, found = Chat(tokenizer, d.plain), {}
    for name, (source, records) in sets.items():
        found[name], _, line = prepare(records, source, chat, cfg, preds) if records else (None, None, "none")
        say(f"{name}: {line}")
    if not found["train"]:
        raise ValueError("no training examples")
    if cfg.ratio and not any(e.pairs for e in found["train"]):
        raise ValueError("no training example has a JEPA term; choose training.regular, or other data")
    for example in found["train"][:2 * (cfg.general.debug > 0)]:
        show(example, tokenizer, say)
    for used, note in ((t.step_jepa and t.last_token, "last_token: a step's state is that of its last token, [PRED]s included; steps close no turn to count from"),
                       (chat.prompt_differs, "the template's generation prompt is not what stands before the assistant's text in a conversation; generate from the latter, as evaluate.py does"),
                       (t.additive_mask, "additive_mask: all views are encoded in one forward pass anyway"),
                       (t.memory_efficient, "memory_efficient: activations computed again" + ("; infonce needs the views of a micro-batch at once, so it stays whole"
                                            if t.infonce else ", and examples one at a time")),
                       (t.optimizer != optimizer_name(t.optimizer), f"optimizer: {optimizer_name(t.optimizer)}, since {t.optimizer} needs CUDA and bitsandbytes")):
        if used:
            say(note)
    trainer = JepaTrainer(cfg, chat, model=model, args=arguments(cfg, bool(found["eval"])), train_dataset=found["train"],
                          eval_dataset=found["eval"], processing_class=tokenizer)
    if t.same_flop and cfg.ratio:
        steps = int(-(-len(found["train"]) // (t.batch_size * t.grad_accum * trainer.args.world_size)) * t.num_epochs)
        trainer.args.max_steps, cost = same_flop_steps(trainer, found["train"], steps)
        say(f"same_flop: a step costs {cost:.3f} of one without the term: {trainer.args.max_steps} steps instead of {steps}")
    return trainer


def run(cfg, origin):
    """Train; returns the result, a flat dict."""
    began, folder = time.perf_counter(), Path(cfg.training.output_dir)
    if bool(cfg.dataset.train_file) == bool(cfg.dataset.data_file):
        raise ValueError("give either dataset.train_file or dataset.data_file")
    if (cfg.training.fsdp or cfg.training.dtype == "fp16") and not torch.cuda.is_available():
        raise ValueError(f"training.{'fsdp' if cfg.training.fsdp else 'dtype=fp16'}: needs CUDA; choose {'one process' if cfg.training.fsdp else 'bf16 or float32'}")
    if (folder / "result.json").exists():
        raise ValueError(f"training.output_dir={folder} holds a finished run; choose another, or remove it")
    first = os.environ.get("RANK", "0") == "0"
    say = functools.partial(print, flush=True) if first else lambda *_: None
    resume = checkpoint(folder, cfg.training.resume, say)
    start = step_of(resume) if resume else 0
    say(f"python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}; source "
        + ", ".join(f"{name} {hashlib.sha256((Path(__file__).parent / name).read_bytes()).hexdigest()[:12]}" for name in SOURCES))
    for key, where in origin.items():
        section, name = key.split(".")
        say(f"{key} = {getattr(getattr(cfg, section), name)!r} ({where})")
    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)  # a run resumed is the run uninterrupted
    trainer = make_trainer(cfg, say)
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False))
    if first and (log := folder / "metrics.jsonl").exists():
        if resume:
            cut_metrics(log, start)
        else:
            log.unlink()
    outcome = trainer.train(resume_from_checkpoint=resume)
    train_seconds = outcome.metrics["train_runtime"] - trainer.eval_seconds
    history = trainer.state.log_history
    if trainer.eval_dataset and not any("eval_loss" in line and line["step"] == trainer.state.global_step for line in history):
        trainer.evaluate()
    save(trainer)
    losses = [line for line in history if "ce_loss" in line]
    last = {k: v for line in history for k, v in line.items() if k in ("ce_loss", "jepa_loss", "eval_loss", "eval_jepa_loss")}
    result = {"train_loss": sum(line["loss"] for line in losses) / len(losses) if losses else outcome.training_loss, **last, "steps": trainer.state.global_step, "resumed_from": start,
              "examples": len(trainer.train_dataset), "examples_per_second": outcome.metrics["train_samples_per_second"] * outcome.metrics["train_runtime"] / train_seconds,
              "train_seconds": train_seconds, "seconds": round(time.perf_counter() - began, 1), "total_flops": trainer.state.total_flos,
              "seed": cfg.general.finetune_seed}
    if torch.cuda.is_available():
        result["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    if first:
        (folder / "result.json").write_text(json.dumps(result) + "\n")
    say(f"result: {json.dumps(result)} -> {folder}")
    return result


def views_of(model, chat, folder, records, batch_size):
    """View A and view B (N, D), float32, CPU, and the number of its record (N,), of a loaded model, by the settings in the config.yaml
    that run() has left in its folder; a run without pairs of its own (regular, span) is asked for pairs whose view A ends in its text."""
    settings, device, tokenizer = Config(), model.device, chat.tokenizer
    if (file := Path(folder) / "config.yaml").is_file():
        settings, _ = load_sections(Config, ["--config", str(file)], ALIASES)
    predictors = settings.dataset.predictors if settings.ratio and not settings.training.span else 0
    preds = tokenizer.convert_tokens_to_ids([f"<|predictor_{n}|>" for n in range(1, predictors + 1)])
    settings.training.regular = settings.training.span = False
    settings.training.lbd, settings.dataset.plain = 1.0, chat.plain
    check_layers(model.config.get_text_config(), settings.dataset.max_length + predictors)
    if (saved := Path(folder) / "jepa_predictor.safetensors").is_file():
        add_predictor(model, saved)
    tap_forward(model)
    check_packing(model, model.dtype)
    examples, kept, line = prepare(records, Path(folder).name, chat, settings, preds)
    print(line, flush=True)
    found = []
    for first in progress(range(0, len(examples), batch_size), desc="encoding"):
        batch = {name: x.to(device) for name, x in pack(examples[first:first + batch_size], False, tokenizer.eos_token_id).items()}
        with torch.no_grad():
            _, u, v, _ = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=attention_mask(model, batch["ends"], model.dtype),
                               keep=torch.zeros(1, dtype=torch.long, device=device), views=batch["views"])
        there = batch["weight"] > 0
        found.append((u[there].cpu(), v[there].cpu(), torch.tensor(kept)[(batch["group"][there] + first).cpu()]))
    return tuple(map(torch.cat, zip(*found)))


def show(example, tokenizer, say):
    """Print what of an example is encoded, trained, and compared."""
    for n, d in enumerate(example.documents):
        say(f"document {n}: {tokenizer.decode(d.trunk)!r}; labels {tokenizer.decode([d.trunk[i] for i in d.loss_on])!r}; branch after {d.fork}: {tokenizer.decode(d.branch)!r}")
    say(f"pairs (document, token): {example.pairs}")


def main(argv=None):
    try:
        run(*load_sections(Config, sys.argv[1:] if argv is None else argv, ALIASES, __doc__))
    except (ValueError, OSError) as e:
        raise SystemExit(f"error: {e}") from None


if __name__ == "__main__":
    main()
