"""LoRA: adapters on every linear layer of a model's blocks, which are found and not assumed.

Projections may be fused (Phi-3's qkv_proj), kept transposed (GPT-2's Conv1D), or be parameters of
three dimensions that hold all experts of a layer.
"""

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D


def add_lora(model, m, tokens, objective, say):
    """The model with LoRA adapters.

    m: the settings of the section model. tokens: ids whose embeddings are trained too. objective:
    the name of a submodule that is trained whole, if it has weights.
    """
    layers, experts = find_layers(model)
    chosen = choose_targets(model, [*layers, *experts], m.lora_targets)
    modules = [name for name in chosen if name in layers]
    parameters = [name for name in chosen if name in experts]
    if parameters:
        # In a mixture, peft takes every up_proj for one of an expert, also that of a dense layer.
        parameters += [f"{name}.weight" for name in modules]
        modules = []
    tables = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    names = {module: name for name, module in model.named_modules()}
    if tables["output"].weight is tables["input"].weight:
        del tables["output"]  # peft trains it with the other
    has_weights = any(True for name, _ in model.named_parameters() if objective in name.split("."))
    say(f"LoRA: adapters on {', '.join(short_names(chosen))}{left_out(model, chosen)}")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=m.lora_rank,
        lora_alpha=2 * m.lora_rank,
        lora_dropout=0.0 if parameters else 0.1,  # peft has none for parameters
        bias="none",
        target_modules=modules,
        target_parameters=parameters or None,
        modules_to_save=[objective] if has_weights else None,
        trainable_token_indices={names[t]: tokens for t in tables.values()} if tokens else None,
    )
    return get_peft_model(model, config)


def find_layers(model):
    """(names of the linear layers of a model's body, names of its parameters of experts)."""
    body = {id(module) for module in model.get_decoder().modules()}
    modules = [(name, module) for name, module in model.named_modules() if id(module) in body]
    layers = [name for name, module in modules if isinstance(module, nn.Linear | Conv1D)]
    experts = [
        f"{name}.{own}"
        for name, module in modules
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]
    return layers, experts


def choose_targets(model, found, named):
    """Those of the found names that the user means: model.lora_targets, or all."""
    if not named:
        return found
    chosen = []
    for target in filter(None, map(str.strip, named.split(","))):
        matches = [name for name in found if f".{name}".endswith(f".{target}")]
        if not matches:
            raise ValueError(
                f"model.lora_targets: {model.config.model_type} has no linear layer {target}; "
                f"choose among {', '.join(short_names(found))}"
            )
        chosen += matches
    return list(dict.fromkeys(chosen))


def short_names(names):
    """The last parts of names, each once, in their order."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def left_out(model, chosen):
    """ "; frozen: .." with the matrices of the body that get no adapter, or ""."""
    body = {id(parameter) for parameter in model.get_decoder().parameters()}
    frozen = [
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters()
        if id(parameter) in body
        and parameter.ndim > 1
        and name.removesuffix(".weight") not in chosen
    ]
    return f"; frozen: {', '.join(short_names(frozen))}" if frozen else ""


def count_trained(model):
    """A line: how many parameters are trained, and their share."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained, total = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
    return f"trained: {trained:,} of {total:,} parameters ({trained / total:.2%})"
