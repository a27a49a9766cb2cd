"""Tiny models with a tokenizer that is trained here, as Hugging Face folders."""

import copy
import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    set_seed,
)

from nanojepa.hf.batches import count_pairs
from nanojepa.hf.run import make_trainer
from nanojepa.hf.settings import ALIASES, Config
from nanojepa.settings import load_settings

KINDS = ("llama", "qwen", "neox")
TEXTS = [
    "You answer in one word.",
    "What is 2 + 2? Say it in words, please.",
    "Two plus two is four.\n\nSo the answer is four.\n\n#### 4",
    "lines with words with a vowel, zero or more times",
    r"(\b([AEIOUaeiou])&([a-z])\b)*",
    "ein Haus, ein säh; 12345 67890",
    "<think>Let me see.</think>yes",
]
# Questions whose answers have steps; every third has no system message.
QUESTIONS = [
    (
        "Be brief." if n % 3 else None,
        f"What is {n} + {n + 1}?" + " Say it." * (n % 4),
        f"First {n}.\n\nThen {2 * n + 1}{'!' * (n % 3)}\n\n#### {2 * n + 1}",
    )
    for n in range(16)
]
# What each family's chat template looks like: Llama's strips texts, NeoX's has no system role.
TEMPLATES = {
    "llama": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "qwen": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "neox": "{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}Question: {{ m.content }}\nAnswer:"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
}
SPECIAL = {
    "llama": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "qwen": ["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
    "neox": ["<|endoftext|>"],
}
ROLES = {
    "llama": dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"),
    "qwen": dict(eos_token="<|im_end|>", pad_token="<|endoftext|>"),
    "neox": dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>"),
}
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM, dict(num_key_value_heads=2)),
    "qwen": (Qwen2Config, Qwen2ForCausalLM, dict(num_key_value_heads=2)),
    "neox": (GPTNeoXConfig, GPTNeoXForCausalLM, dict(rotary_pct=0.5)),
}
SHAPE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    initializer_range=0.3,
    attention_dropout=0.0,
    tie_word_embeddings=False,
)


def make_tokenizer(kind, vocab_size=320, texts=TEXTS, split=True, **changes):
    """A byte-level BPE tokenizer with the special tokens and the chat template of a family.

    split: no token spans two words, as GPT-2's.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL[kind],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    options = {"clean_up_tokenization_spaces": False, **ROLES[kind], **changes}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **options)
    tokenizer.chat_template = TEMPLATES[kind]
    return tokenizer


def make_model(kind, vocab_size, seed=0, **changes):
    set_seed(seed)
    config, model, own = CLASSES[kind]
    return model(config(vocab_size=vocab_size, **{**SHAPE, **own, **changes})).float().eval()


def make_folder(folder, kind, texts=TEXTS, vocab_size=320, **changes):
    """A model's folder, as from_pretrained loads it; returns its path."""
    tokenizer = make_tokenizer(kind, vocab_size, texts)
    model = make_model(kind, len(tokenizer), **changes)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_messages(path, examples):
    """A JSON-lines file of (system or None, user, assistant); returns its path."""
    with open(path, "w") as file:
        for system, user, assistant in examples:
            turns = [("user", user), ("assistant", assistant)]
            if system:
                turns.insert(0, ("system", system))
            messages = [{"role": role, "content": text} for role, text in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return str(path)


def one_batch(trainer, examples, term=True):
    """The Batch that a step of these examples would be if a pass could hold all of them."""
    packer = copy.copy(trainer.packer)
    packer.max_rows = len(examples) * 8
    (batch,) = packer.split([examples], [0], term, 0, max(1, count_pairs(examples)))
    return batch


def tuned_curve(folder, flags):
    """[[ce_loss, jepa_loss], ...]: 20 steps of finetune.py on a tiny Llama and QUESTIONS."""
    torch.set_num_threads(1)
    settings = {
        "model_name": make_folder(folder / "llama", "llama"),
        "train_file": write_messages(folder / "questions.jsonl", QUESTIONS),
        "output_dir": folder / "out",
        "dtype": "float32",
        "batch_size": 4,
        "grad_accum": 1,
        "num_epochs": 5,
        "learning_rate": 1e-3,
        "lbd": 0.1,
    }
    arguments = [*(f"--{name}={value}" for name, value in settings.items()), *flags]
    cfg = load_settings(Config, arguments, aliases=ALIASES).config
    trainer = make_trainer(cfg, say=lambda line: None)
    trainer.args.save_strategy = "no"
    trainer.train()
    lines = [line for line in trainer.state.log_history if "ce_loss" in line]
    return [[line["ce_loss"], line["jepa_loss"]] for line in lines]
