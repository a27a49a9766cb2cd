"""Print docs/settings.md: python docs/make_settings.py > docs/settings.md

The page is made from the settings' own comments; tests/test_house.py compares.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_gpt
from nanojepa.hf import settings as finetuning
from nanojepa.settings import settings_markdown

PAGE = """# Settings

This page is made by `python docs/make_settings.py > docs/settings.md` from the comments in
`train_gpt.py` and `nanojepa/hf/settings.py`; edit those.

A value comes from the default, or a YAML file (`--config FILE`), or the environment, or a flag. The
later one of these wins. A misspelt key, flag or `JEPA_` variable is refused, and so is a value out
of its range. A yes-or-no setting is true or false, 1 or 0. The console prints the settings that
aren't the default, and a run's `log.txt` all of them, with where each comes from.

## train_gpt.py

`JEPA_LAMBDA=0.1` in the environment, `--jepa_lambda 0.1` and `jepa_lambda: 0.1` in YAML are the
same.

{pretraining}
## finetune.py

The YAML file has four sections. `training.lbd` is the key `lbd` in the section `training`, and the
flag `--training.lbd`, or `--lbd` since no other section has that key. A yes-or-no flag needs no
value. The environment isn't read. These flags have other names too: {aliases}.

{finetuning}"""


def main():
    aliases = [f"`--{flag}` for `{key}`" for flag, key in finetuning.ALIASES.items()]
    page = PAGE.format(
        pretraining=settings_markdown(train_gpt.Config),
        finetuning=settings_markdown(finetuning.Config),
        aliases=", ".join(aliases),
    )
    print(page, end="")


if __name__ == "__main__":
    main()
