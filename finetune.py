"""Fine-tune a Hugging Face causal LM with next-token cross entropy and a JEPA term.

    python finetune.py --config configs/finetune_example.yaml     one process: a GPU, or a CPU
    torchrun --nproc_per_node 8 finetune.py --config FILE         one process a GPU
    jepa-llm --config my-run.yaml                                 the same, where it is installed

Each key of the YAML file is a flag too: --section.key, or --key if only one section has it. The
terms are those of train_gpt.py, nanojepa/objectives; the code is in nanojepa/hf:

    settings.py   every key, its default and its range
    chat.py       messages as tokens, through the tokenizer's chat template
    layout.py     records as the examples that an objective lays out
    model.py      loading; the losses of a packed batch in the model's forward pass; LoRA
    trainer.py    the step: batches, sums over counts, evaluation
    export.py     checkpoints and the trained model, sealed
    run.py        all of it in order
"""

from nanojepa.hf.run import main

if __name__ == "__main__":
    main(usage=__doc__)
