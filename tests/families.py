"""The chat templates and tokenizers of twelve families of models, rebuilt small.

Each template has the constructs of the original: trimming, default and missing system roles, dates,
thinking, end tokens, headers. Each tokenizer has the original's normalizer, pretokenizer, decoder
and kinds of added tokens, and a vocabulary that is trained here.
"""

import json
from typing import NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "You answer in one word. What is 2 + 2? Say it in words, please.",
    "Two plus two is four.\n\nSo the answer is four.\n\n#### 4",
    "user assistant system model Today Date: 26 Jul 2024 Knowledge cutoff",
    "ein Haus, ein säh; 12345 67890",
]
# How GPT-4's and Llama 3's tokenizers cut text before BPE, without the contractions' case rules.
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Family(NamedTuple):
    """vocabulary: bytes, prefixed or spaced. special: control tokens; added: other added tokens.

    rstrip: control tokens take in the whitespace that follows. end: what closes an answer.
    """

    template: str
    vocabulary: str
    special: list
    eos: str
    end: str
    bos: str | None = None
    added: tuple = ()
    rstrip: bool = False


CHATML_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

FAMILIES = {
    "llama-2": Family(
        """{% if messages[0].role == 'system' %}{% set loop_messages = messages[1:] %}
        {%- set system_message = messages[0].content %}{% else %}
        {%- set loop_messages = messages %}{% set system_message = false %}{% endif %}
        {%- for message in loop_messages %}
        {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}
        {%- if loop.index0 == 0 and system_message != false %}
        {%- set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message.content %}
        {%- else %}{% set content = message.content %}{% endif %}
        {%- if message.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
        {%- else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
        "prefixed",
        ["<unk>", "<s>", "</s>"],
        eos="</s>",
        end=" </s>",
        bos="<s>",
    ),
    "llama-3": Family(
        """{{- bos_token }}{% if not date_string is defined %}
        {%- if strftime_now is defined %}{% set date_string = strftime_now("%d %b %Y") %}
        {%- else %}{% set date_string = "26 Jul 2024" %}{% endif %}{% endif %}
        {%- if messages[0]['role'] == 'system' %}
        {%- set system_message = messages[0]['content']|trim %}{% set messages = messages[1:] %}
        {%- else %}{% set system_message = "" %}{% endif %}
        {{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
        {{- "Cutting Knowledge Date: December 2023\n" }}
        {{- "Today Date: " + date_string + "\n\n" }}{{ system_message }}{{ "<|eot_id|>" }}
        {%- for message in messages %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}{% endfor %}
        {%- if add_generation_prompt %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}""",
        "bytes",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        eos="<|eot_id|>",
        end="<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "qwen-2.5": Family(
        """{%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% else %}
        {{- '<|im_start|>system\nYou are Qwen. You are a helpful assistant.<|im_end|>\n' }}
        {%- endif %}{% for message in messages %}
        {%- if (message.role == "system" and not loop.first) or message.role != "system" %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
        {%- endif %}{% endfor %}"""
        + CHATML_PROMPT,
        "bytes",
        IM,
        eos="<|im_end|>",
        end="<|im_end|>",
    ),
    "qwen-3": Family(
        """{%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}
        {%- for message in messages %}{% set content = message.content %}
        {%- if message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
        {%- elif message.role == "assistant" %}{% set reasoning = '' %}
        {%- if '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1] %}
        {%- set reasoning = reasoning.lstrip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
        {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning.strip('\n') }}
        {{- '\n</think>\n\n' + content.lstrip('\n') + '<|im_end|>\n' }}{% endif %}{% endfor %}
        {%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
        {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}""",
        "bytes",
        IM,
        eos="<|im_end|>",
        end="<|im_end|>",
        added=("<think>", "</think>", "<tool_call>", "</tool_call>"),
    ),
    "gemma-2": Family(
        """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
        {{- raise_exception('System role not supported') }}{% endif %}
        {%- for message in messages %}
        {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate') }}{% endif %}
        {%- if (message['role'] == 'assistant') %}{% set role = 'model' %}
        {%- else %}{% set role = message['role'] %}{% endif %}
        {{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
        {%- endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}""",
        "spaced",
        ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
        eos="<eos>",
        end="<end_of_turn>",
        bos="<bos>",
        added=("\n\n", "\n\n\n", "<table>"),
    ),
    "gemma-3": Family(
        """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
        {%- if messages[0]['content'] is string %}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' %}{% else %}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' %}{% endif %}
        {%- set loop_messages = messages[1:] %}{% else %}{% set first_user_prefix = "" %}
        {%- set loop_messages = messages %}{% endif %}{% for message in loop_messages %}
        {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Conversation roles must alternate user/assistant/...") }}{% endif %}
        {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
        {{- '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
        {%- if message['content'] is string %}{{ message['content'] | trim }}{% else %}
        {%- for item in message['content'] %}{{ item['text'] | trim }}{% endfor %}{% endif %}
        {{- '<end_of_turn>\n' }}{% endfor %}
        {%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
        "spaced",
        ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
        eos="<eos>",
        end="<end_of_turn>",
        bos="<bos>",
        added=("\n\n", "\n\n\n", "<table>"),
    ),
    "phi-3": Family(
        """{% for message in messages %}{% if message['role'] == 'system' %}
        {{- '<|system|>\n' + message['content'] + '<|end|>\n' }}
        {%- elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '<|end|>\n' }}
        {%- elif message['role'] == 'assistant' %}
        {{- '<|assistant|>\n' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}
        {%- if add_generation_prompt %}{{ '<|assistant|>\n' }}
        {%- else %}{{ eos_token }}{% endif %}""",
        "prefixed",
        ["<unk>", "<s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|user|>", "<|end|>"],
        eos="<|endoftext|>",
        end="<|end|>",
        bos="<s>",
        rstrip=True,
    ),
    "phi-4": Family(
        """{% for message in messages %}{% if message['role'] == 'system' %}
        {{- '<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>' }}
        {%- elif message['role'] == 'user' %}
        {{- '<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>' }}
        {%- elif message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>' }}
        {%- endif %}{% endfor %}
        {%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}""",
        "bytes",
        [*IM, "<|im_sep|>"],
        eos="<|im_end|>",
        end="<|im_end|>",
        bos="<|endoftext|>",
        rstrip=True,
    ),
    "mistral-v1": Family(
        """{{ bos_token }}{% for message in messages %}
        {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}
        {%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
        {%- elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}
        {%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}
        {%- endif %}{% endfor %}""",
        "prefixed",
        ["<unk>", "<s>", "</s>"],
        eos="</s>",
        end="</s>",
        bos="<s>",
    ),
    "mistral-v3": Family(
        """{%- if messages[0]['role'] == 'system' %}
        {%- set system_message = messages[0]['content'] %}{% set loop_messages = messages[1:] %}
        {%- else %}{% set loop_messages = messages %}{% endif %}{{ bos_token }}
        {%- for message in loop_messages %}{% if message['role'] == 'user' %}
        {%- if loop.last or loop.first %}{% if system_message is defined %}
        {{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}{% else %}
        {{- '[INST] ' + message['content'] + '[/INST]' }}{% endif %}{% endif %}
        {%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}
        {%- else %}{{ raise_exception('Only user, system and assistant roles!') }}{% endif %}
        {%- endfor %}""",
        "prefixed",
        ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"],
        eos="</s>",
        end="</s>",
        bos="<s>",
    ),
    "mistral-v7": Family(
        """{%- set today = strftime_now("%Y-%m-%d") %}
        {%- set default_system_message = "You are Mistral. The current date is " + today + "." %}
        {{- bos_token }}{% if messages[0]['role'] == 'system' %}
        {%- set system_message = messages[0]['content'] %}{% set loop_messages = messages[1:] %}
        {%- else %}{% set system_message = default_system_message %}
        {%- set loop_messages = messages %}{% endif %}
        {{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}
        {%- for message in loop_messages %}{% if message['role'] == 'user' %}
        {{- '[INST]' + message['content'] + '[/INST]' }}
        {%- elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}
        {%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}
        {%- endif %}{% endfor %}""",
        "bytes",
        ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"],
        eos="</s>",
        end="</s>",
        bos="<s>",
    ),
    "zephyr": Family(
        """{% for message in messages %}\n{% if message['role'] == 'user' %}
        {{- '<|user|>\n' + message['content'] + eos_token }}
        {%- elif message['role'] == 'system' %}
        {{- '<|system|>\n' + message['content'] + eos_token }}
        {%- elif message['role'] == 'assistant' %}
        {{- '<|assistant|>\n' + message['content'] + eos_token }}{% endif %}
        {%- if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}
        {%- if not loop.last %}\n{% endif %}{% endfor %}""",
        "prefixed",
        ["<unk>", "<s>", "</s>"],
        eos="</s>",
        end="</s>",
        bos="<s>",
    ),
    "chatml": Family(
        "{% for m in messages %}" + CHATML_TURN + "{% endfor %}" + CHATML_PROMPT,
        "bytes",
        ["<|endoftext|>"],  # as in a base model to which the others were added
        eos="<|endoftext|>",
        end="<|im_end|>",
        added=("<|im_start|>", "<|im_end|>"),
    ),
    "gpt-oss": Family(
        """{{- "<|start|>system<|message|>You are ChatGPT.\nKnowledge cutoff: 2024-06\n" }}
        {{- "Current date: " + strftime_now("%Y-%m-%d") + "\n\nReasoning: medium<|end|>" }}
        {%- if messages[0].role in ("system", "developer") %}
        {{- "<|start|>developer<|message|># Instructions\n\n" + messages[0].content }}
        {{- "<|end|>" }}{% set messages = messages[1:] %}{% endif %}
        {%- for message in messages %}{% if message.role == 'assistant' %}
        {%- if "<|channel|>analysis<|message|>" in message.content %}
        {{- raise_exception("You have passed a message containing <|channel|> tags.") }}
        {%- elif loop.last and not add_generation_prompt %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
        {%- else %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
        {%- endif %}{% elif message.role == 'user' %}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}{% endif %}{% endfor %}
        {%- if add_generation_prompt %}{{ "<|start|>assistant" }}{% endif %}""",
        "bytes",
        ["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|start|>", "<|channel|>"]
        + ["<|message|>", "<|end|>"],
        eos="<|return|>",
        end="<|return|>",
        bos="<|startoftext|>",
    ),
    "olmo-2": Family(
        """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}
        {{- '<|system|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'user' %}
        {{- '<|user|>\n' + message['content'] + '\n' }}
        {%- elif message['role'] == 'assistant' %}{% if not loop.last %}
        {{- '<|assistant|>\n' + message['content'] + eos_token + '\n' }}{% else %}
        {{- '<|assistant|>\n' + message['content'] + eos_token }}{% endif %}{% endif %}
        {%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
        {%- endfor %}""",
        "bytes",
        ["<|endoftext|>"],
        eos="<|endoftext|>",
        end="<|endoftext|>",
        bos="<|endoftext|>",
    ),
}


def make_core(vocabulary, texts):
    """A trained tokenizers.Tokenizer.

    bytes: byte-level BPE, as GPT-4's. prefixed: SentencePiece's, with a blank before every text, as
    Llama 2's. spaced: without that blank, as Gemma's.
    """
    if vocabulary == "bytes":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(CL100K), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        core.decoder = decoders.ByteLevel()
        alphabet, names = pre_tokenizers.ByteLevel.alphabet(), []
    else:
        core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        steps = [normalizers.Replace(" ", "▁")]
        ends = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if vocabulary == "prefixed":
            steps.insert(0, normalizers.Prepend("▁"))
            ends.append(decoders.Strip(" ", left=1))
        core.normalizer, core.decoder = normalizers.Sequence(steps), decoders.Sequence(ends)
        alphabet, names = ["▁"], ["<unk>", *(f"<0x{n:02X}>" for n in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    state = json.loads(core.to_str())
    state["added_tokens"] = []  # bytes are tokens like others
    return Tokenizer.from_str(json.dumps(state))


def make_tokenizer(name, texts=TEXTS):
    """The tokenizer of a family, with its template."""
    family = FAMILIES[name]
    core = make_core(family.vocabulary, texts)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        clean_up_tokenization_spaces=False,
        eos_token=family.eos,
        bos_token=family.bos,
        unk_token="<unk>" if "<unk>" in family.special else None,
    )
    special = [
        AddedToken(token, special=True, normalized=False, rstrip=family.rstrip)
        for token in family.special
    ]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in family.added])
    tokenizer.chat_template = family.template
    return tokenizer
