"""Tiny models with a tokenizer trained here, as Hugging Face folders."""
import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, set_seed
from transformers import GPTNeoXForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM

TEXTS = ["You answer in one word.", "What is 2 + 2? Say it in words, please.", "Two plus two is four.\n\nSo the answer is four.\n\n#### 4",
         "lines with words with a vowel, zero or more times", r"(\b([AEIOUaeiou])&([a-z])\b)*", "ein Haus, ein säh; 12345 67890", "<think>Let me see.</think>yes"]
LLAMA = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
         "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
QWEN = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
NEOX = ("{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'user' %}Question: {{ m.content }}\nAnswer:{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
SPECIAL = {"llama": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"], "qwen": ["<|endoftext|>", "<|im_end|>", "<|im_start|>"], "neox": ["<|endoftext|>"]}
SHAPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256, initializer_range=0.3,
             attention_dropout=0.0, tie_word_embeddings=False)


def make_tokenizer(kind, vocab_size=320, texts=TEXTS, split=True, **changes):
    """A byte-level BPE tokenizer with the special tokens and the chat template of a family of models. split: words apart, as GPT-2's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split), decoders.ByteLevel()
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL[kind], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                        show_progress=False))
    names = {"llama": dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"), "qwen": dict(eos_token="<|im_end|>", pad_token="<|endoftext|>"),
             "neox": dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>")}[kind]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **{**names, **changes})
    tokenizer.chat_template = {"llama": LLAMA, "qwen": QWEN, "neox": NEOX}[kind]
    return tokenizer


def make_model(kind, vocab_size, seed=0, **changes):
    set_seed(seed)
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen": (Qwen2Config, Qwen2ForCausalLM), "neox": (GPTNeoXConfig, GPTNeoXForCausalLM)}[kind]
    shape = {**SHAPE, **({} if kind == "neox" else {"num_key_value_heads": 2}), **({"rotary_pct": 0.5} if kind == "neox" else {}), **changes}
    return model(config(vocab_size=vocab_size, **shape)).to(torch.float32).eval()


def make_folder(folder, kind, texts=TEXTS, vocab_size=320, **changes):
    """A model's folder, as from_pretrained loads it."""
    tokenizer = make_tokenizer(kind, vocab_size, texts)
    model = make_model(kind, len(tokenizer), **changes)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_messages(path, examples):
    """A file of (system or None, user, assistant)."""
    with open(path, "w") as f:
        for system, user, assistant in examples:
            turns = ([("system", system)] if system else []) + [("user", user), ("assistant", assistant)]
            f.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    return str(path)
