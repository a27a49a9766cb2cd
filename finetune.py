"""Fine-tune a Hugging Face causal LM; nanojepa/hf/run.py says how, and is the run."""

from nanojepa.hf.run import main

if __name__ == "__main__":
    main()
