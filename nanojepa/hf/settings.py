"""The settings of finetune.py: four sections, whose fields are YAML keys and flags.

The comment of a setting is its documentation, and its type holds the values it may take.
"""

import datetime
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch

from nanojepa.hf.chat import DATE
from nanojepa.objectives import Terms, kinds
from nanojepa.objectives.distance import DISTANCES
from nanojepa.settings import Fraction, Natural, NonNegative, OneOf, OrBool, Positive, Range

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
# Flags of the scripts that finetune.py replaces, if they have another name than our key.
ALIASES = {
    "model_name": "model.name",
    "lora": "model.use_lora",
    "seed": "general.finetune_seed",
    "trainall": "dataset.train_all",
    "wandb": "general.use_wandb",
}


@dataclass(frozen=True)
class IsDate:
    """A date as 2024-07-26."""

    def wrong(self, value):
        try:
            datetime.date.fromisoformat(value)
        except ValueError:
            return f"must be a date as {DATE}"
        return ""


@dataclass
class General:
    # Show so many examples, what of them is trained and compared, then counts, and stop.
    show: Natural = 0
    debug: Annotated[int, OrBool(), Range(0)] = 0  # above 0: show two examples, then train
    finetune_seed: Natural = 42  # of data order, drawn spans, dropped terms and new weights
    use_wandb: bool = False  # report to Weights & Biases
    wandb_project: str = "jepa-llm"  # its project
    wandb_run_name: str = ""  # its run name; empty: that of output_dir
    wandb_entity: str = ""  # its entity
    wandb_group: str = ""  # its group
    wandb_tags: str = ""  # its tags, separated by commas
    wandb_mode: Literal["online", "offline", "disabled"] = "online"  # how it reports


@dataclass
class Model:
    name: str = "meta-llama/Llama-3.2-1B-Instruct"  # Hugging Face name or folder
    # Train LoRA adapters, which are merged in the end. The frozen weights are kept in
    # training.dtype.
    use_lora: bool = False
    # Rank of the adapters. Their alpha is twice that. Their dropout is 0.1, or 0 if some are on the
    # experts of a mixture.
    lora_rank: Positive = 16
    # Layers with an adapter, as q_proj,v_proj; empty: every linear layer of the blocks.
    lora_targets: str = ""
    pretrain: bool = False  # start from random weights
    cache_dir: str = ""  # folder of downloaded models
    trust_remote_code: bool = False  # run Python code that comes with the model
    # How attention is computed. All but flex_attention (CUDA) keep a dense mask of T numbers a
    # token, so auto takes it, if it can, from a max_length of 1,025 on.
    attn_implementation: Literal["auto", "sdpa", "eager", "flex_attention"] = "auto"


@dataclass
class Data:
    # A file or a Hugging Face dataset: of messages, of another form that is recognised, or of
    # paraphrases (docs/data.md).
    train_file: str = ""
    eval_file: str = ""  # the same, evaluated every eval_steps
    data_file: str = ""  # the same, to be split into train and eval
    eval_split: Fraction = 0.2  # the part of data_file that is eval
    split_seed: Natural = 42  # of that split
    max_items: Natural = 0  # training examples at most; 0: all
    max_eval_items: Natural = 0  # eval examples at most; 0: all
    config_name: str = ""  # configuration of a Hugging Face dataset
    train_split: str = ""  # split of train_file or data_file, a dataset; empty: train
    test_split: str = ""  # split of eval_file, a dataset; empty: test, or else validation
    columns: str = ""  # columns that hold the user's and the assistant's text, as question,answer
    bad: Literal["stop", "skip"] = "stop"  # what a line that is wrong does; either names it
    # Tokens of a document; the rest is cut off, and said to be.
    max_length: Annotated[int, Range(8)] = 512
    # ---- JEPA
    predictors: Annotated[int, Range(0, 10)] = 0  # [PRED] tokens after view A
    # What view A is. Standalone: a conversation of its own, as in LLM-JEPA; it is encoded apart if
    # there is a system message. Prefix: the beginning of the conversation, which is encoded
    # anyway. That is cheaper, but another term, since the system message is seen.
    views: Literal["standalone", "prefix"] = "standalone"
    # ---- texts
    train_all: bool = False  # cross entropy on every token, not on the assistant's alone
    plain: bool = False  # no chat template: the two texts, a line break between, an end token
    # Drop <think> and <Thought> passages of the assistant's text. Of <Output> and <Answer> only
    # the tags go.
    remove_thinking: bool = True
    # What a chat template that writes the day is told, today and on any other day.
    date: Annotated[str, IsDate()] = DATE
    cache_dir: str = ""  # folder of downloaded datasets
    preprocess_num_proc: Natural = 0  # no effect; the processes that tokenise clean the texts too
    tokenize_num_proc: Natural = 0  # processes that tokenise; 0: one for 1,000 examples
    tokenize_batch_size: Positive = 1000  # examples that one of them takes at a time

    def __post_init__(self):
        if self.columns and len(self.columns.split(",")) != 2:
            raise ValueError(f"dataset.columns={self.columns}: must name two, as question,answer")
        if self.data_file and self.eval_file:
            raise ValueError(
                "dataset.eval_file: data_file is split into train and eval; "
                "give train_file with eval_file"
            )
        if self.data_file and self.eval_split == 1:
            raise ValueError("dataset.eval_split=1: leaves nothing to train on")


@dataclass
class Training:
    output_dir: str = "./checkpoints"  # folder of the model, its checkpoints and its losses
    # A step has batch_size x grad_accum examples a process. With infonce a pass has batch_size.
    batch_size: Positive = 4
    grad_accum: Positive = 4  # see batch_size
    # Tokens of a forward pass and process, padding counted: a step's examples are packed in as few
    # passes as hold no more. Memory grows with it; sharded weights are gathered for each pass.
    micro_batch_tokens: Positive = 4096
    learning_rate: NonNegative = 2e-5  # at the start; it falls linearly to 0
    num_epochs: NonNegative = 3.0  # epochs
    eval_steps: Positive = 10  # steps between evaluations
    save_steps: Natural = 0  # steps between checkpoints; 0: every epoch
    save_total_limit: Positive = 2  # checkpoints that are kept
    logging_steps: Positive = 1  # steps between log lines, each of which waits for the device
    # ---- JEPA
    lbd: NonNegative = 0.1  # weight of the term
    gamma: NonNegative = 1.0  # weight of the cross entropy
    # The term: span, pair, step, future, masked, next, mtp or masked_ce; docs/objectives.md has
    # each. Several, each times a factor: masked,mtp:0.5.
    objective: Terms = "pair"
    regular: bool = False  # no term
    step_jepa: bool = False  # the same as objective: step
    span: bool = False  # the same as objective: span
    # The token whose state is a view's. -1: the last of its turn; -2: the one before; and so on.
    # 0: the last of its text, whatever the template writes after it.
    last_token: int = 0
    front_pred: bool = False  # [PRED] tokens before view A; it is encoded again for that
    reverse_pred: bool = False  # view B predicts view A
    linear_predictor: bool = False  # a trained D x D matrix on view A
    # How far two views are apart. cosine: 1 - cos. The negatives of infonce are the micro-batch's.
    distance: OneOf(DISTANCES) = "cosine"
    jepa_l2: bool = False  # the same as distance: l2
    jepa_mse: bool = False  # the same as distance: mse
    infonce: bool = False  # the same as distance: infonce
    jepa_ratio: float = -1.0  # chance that a step computes the term at all; -1: it always does
    # ---- cost
    same_flop: bool = False  # as many steps as cost what num_epochs cost without the term
    track_flop: bool = False  # print the FLOPs of the first ten steps
    additive_mask: bool = False  # no effect; all views are encoded in one forward pass anyway
    memory_efficient: bool = False  # one row at a time, and gradient_checkpointing; same loss
    # Compute activations again in the backward pass: a third more time, much less memory.
    gradient_checkpointing: bool = False
    dtype: OneOf(DTYPES) = "bf16"  # of the computation
    # Of weights that are trained. bfloat16: weights, gradients and Adam's state take 6 bytes a
    # parameter, not 16. It needs optimizer: adamw_torch_8bit, which rounds at random up or down, or
    # small updates would be lost.
    weights: Literal["float32", "bfloat16"] = "float32"
    # One of TrainingArguments.optim. adamw_8bit needs CUDA and bitsandbytes; without them
    # adamw_torch_fused is taken. adamw_torch_8bit needs torchao.
    optimizer: str = "adamw_8bit"
    fsdp: bool = False  # shard weights, gradients and optimizer over the processes (FSDP2)
    resume: str = ""  # continue from this checkpoint; auto: from the newest in output_dir, if any


@dataclass
class Config:
    general: General = field(default_factory=General)
    model: Model = field(default_factory=Model)
    dataset: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)

    def __post_init__(self):
        t, d = self.training, self.dataset
        terms = [name for name in ("regular", "step_jepa", "span") if getattr(t, name)]
        if t.objective != Training.objective:
            terms.append(f"objective={t.objective}")
        distances = [name for name in ("jepa_l2", "jepa_mse", "infonce") if getattr(t, name)]
        if t.distance != Training.distance:
            distances.append(f"distance={t.distance}")
        for given in (terms, distances):
            if len(given) > 1:
                raise ValueError(f"training: choose one of {', '.join(given)}")
        if t.jepa_ratio != -1 and not 0 < t.jepa_ratio <= 1:
            raise ValueError(
                f"training.jepa_ratio={t.jepa_ratio}: must be -1, or above 0 and at most 1"
            )
        if t.weights == "bfloat16" and (t.dtype, t.optimizer) != ("bf16", "adamw_torch_8bit"):
            raise ValueError(
                "training.weights=bfloat16: needs optimizer: adamw_torch_8bit, and dtype: bf16"
            )
        if t.last_token > 0:
            raise ValueError(f"training.last_token={t.last_token}: must be 0 or less")
        of_pairs = d.predictors or t.front_pred or t.reverse_pred or t.last_token
        if self.objective and of_pairs and not self.compares_texts:
            raise ValueError(
                f"training.objective={self.objective}: it compares no two texts; remove "
                "dataset.predictors, front_pred, reverse_pred and last_token"
            )

    @property
    def objective(self):
        """The name of the term, as training.objective, or "" if there is no term."""
        t = self.training
        if self.ratio == 0:
            return ""
        if t.step_jepa:
            return "step"
        return "span" if t.span else t.objective

    @property
    def compares_texts(self):
        """Whether the term compares two texts."""
        return self.objective != "" and any(kind.needs_pairs for kind in kinds(self.objective))

    @property
    def distance(self):
        """The key in DISTANCES of how far views are apart."""
        t = self.training
        flags = {"l2": t.jepa_l2, "mse": t.jepa_mse, "infonce": t.infonce}
        return next((name for name, given in flags.items() if given), t.distance)

    @property
    def ratio(self):
        """The fraction of the steps that compute the term."""
        t = self.training
        if t.regular or t.lbd == 0:
            return 0.0
        return 1.0 if t.jepa_ratio == -1 else t.jepa_ratio

    @property
    def recomputes(self):
        """Whether activations are computed again in the backward pass."""
        return self.training.gradient_checkpointing or self.training.memory_efficient
