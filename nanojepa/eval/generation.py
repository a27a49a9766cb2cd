"""What a Hugging Face model answers to questions: greedy texts, and choices among letters."""

import torch

from nanojepa.eval.tasks import LETTERS, TASKS
from nanojepa.files import progress
from nanojepa.hf.limits import position_range


def generate(model, chat, prompts, limit, **options):
    """What model.generate() returns for prompts of token ids: greedy, padded on the left."""
    pad = chat.tokenizer.pad_token_id
    if pad is None:
        pad = chat.stop_tokens[0]
    longest = max(map(len, prompts))
    missing = [longest - len(prompt) for prompt in prompts]
    rows = [[pad] * n + prompt for n, prompt in zip(missing, prompts, strict=True)]
    mask = [[0] * n + [1] * (longest - n) for n in missing]
    return model.generate(
        input_ids=torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        do_sample=False,
        max_new_tokens=limit,
        use_cache=True,
        eos_token_id=chat.stop_tokens,
        pad_token_id=pad,
        **options,
    )


def choose_letters(model, chat, prompts):
    """For each prompt, which of LETTERS is the likeliest to continue it."""
    turns = [chat.conversation(None, "?", letter) for letter in LETTERS]
    letters = [turn.tokens[turn.assistant[0]] for turn in turns]
    if len(set(letters)) < len(letters):
        raise ValueError(
            f"the tokenizer begins two of the letters A to D with one token ({letters}), so the "
            "model can't choose; use another task, such as exact"
        )
    output = generate(model, chat, prompts, 1, output_logits=True, return_dict_in_generate=True)
    return [LETTERS[best] for best in output.logits[0][:, letters].argmax(-1).tolist()]


def text_of(chat, tokens):
    """The text of generated tokens, after the turn's header and up to the first that stops."""
    stops = (n for n, token in enumerate(tokens) if token in chat.stop_tokens)
    tokens = tokens[: next(stops, len(tokens))]
    header, _ = chat.encode_all([chat.header])
    if tokens[: len(header)] == header:
        tokens = tokens[len(header) :]
    # Cleaning up would rewrite " ." as ".".
    return chat.tokenizer.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    ).removeprefix(chat.header)


@torch.no_grad()
def predict(model, chat, questions, tokens, batch_size):
    """Yield (questions, the model's texts), a batch at a time, the longest prompts first."""
    prompts = {}
    for q in questions:
        start = chat.before_text if TASKS[q.task].chooses else chat.prompt
        prompts[q.line] = start(q.system, q.user)
    window = position_range(model.config.get_text_config())
    rows = model.get_input_embeddings().num_embeddings
    for line, prompt in prompts.items():
        if len(prompt) >= window:
            raise ValueError(
                f"line {line} of --data: its prompt has {len(prompt)} tokens, the model takes "
                f"{window}; shorten or remove it"
            )
        if max(prompt) >= rows:
            raise ValueError(
                f"line {line} of --data: its prompt has token {max(prompt)}, and the model's "
                f"embedding {rows} rows for the {len(chat.tokenizer)} tokens of its tokenizer; "
                "take the tokenizer that it was trained with, or fine-tune it, which adds rows"
            )
    order = sorted(questions, key=lambda q: -len(prompts[q.line]))
    kinds = [[q for q in order if TASKS[q.task].chooses == chooses] for chooses in (False, True)]
    batches = [kind[i : i + batch_size] for kind in kinds for i in range(0, len(kind), batch_size)]
    for batch in progress(batches, "evaluating"):
        inputs = [prompts[q.line] for q in batch]
        if TASKS[batch[0].task].chooses:
            yield batch, choose_letters(model, chat, inputs)
        else:
            longest = max(map(len, inputs))
            new = generate(model, chat, inputs, min(tokens, window - longest))[:, longest:]
            yield batch, [text_of(chat, row) for row in new.tolist()]
