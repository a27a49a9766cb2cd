"""Settings of a script, one dataclass of knobs: default < YAML (--config) < environment (JEPA_LAMBDA=0.1) < flag (--jepa_lambda 0.1).

The environment name is the field name in capitals. Misspelt keys, flags and JEPA_* variables are refused.
"""
import argparse
import dataclasses
import difflib
import math
from pathlib import Path

import yaml


def knob(default, doc, low=None, high=None):
    """A setting with its one line of documentation and the range it must lie in, both ends included."""
    return dataclasses.field(default=default, metadata={"doc": doc, "low": low, "high": high})


def check_ranges(config):
    """Raise ValueError naming the first knob outside its range, or not finite."""
    for f in dataclasses.fields(config):
        value, low, high = getattr(config, f.name), f.metadata["low"], f.metadata["high"]
        if f.type is float and not math.isfinite(value):
            raise ValueError(f"{f.name.upper()}={value}: must be finite")
        if low is not None and not low <= value <= (math.inf if high is None else high):
            raise ValueError(f"{f.name.upper()}={value}: must be at least {low}" + (f" and at most {high}" if high is not None else ""))


def parse_value(kind, text, where):
    """The value of type `kind` that text (a string, or what YAML made of it) stands for; ValueError naming `where`."""
    if kind is bool and str(text).lower() in ("0", "1", "true", "false"):
        return str(text).lower() in ("1", "true")
    try:
        if kind is not bool and not isinstance(text, bool):
            if kind is str and text is None:
                return ""
            if not (kind is int and isinstance(text, float)):
                return kind(text)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{where}: {text!r} is not {'0 or 1' if kind is bool else 'a valid ' + kind.__name__}")


def nearest(name, names):
    return "".join(f"; did you mean {match}?" for match in difflib.get_close_matches(name, names, n=1, cutoff=0.5))


def load_config(Config, argv, environ, description=""):
    """(Config, {field: where its value comes from}, [warnings]); ValueError says what is wrong, where, and what to do.

    Config: a dataclass of knobs, none of which is called config. argv: flags without the program's name; environ: a mapping.
    """
    fields = {f.name: f for f in dataclasses.fields(Config)}
    values, origin, warnings = {}, dict.fromkeys(fields, "default"), []

    def put(name, text, where):
        values[name], origin[name] = parse_value(fields[name].type, text, where), where

    parser = argparse.ArgumentParser(allow_abbrev=False, description=description, epilog="Each flag is also an environment variable, "
                                     "in capitals.", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML file of these settings")
    for name, f in fields.items():
        parser.add_argument(f"--{name}", metavar=f.type.__name__.upper(), help=f"{f.metadata['doc']} (default: {f.default!r})".replace("%", "%%"))
    def refuse(message):
        raise ValueError(message)
    parser.error = refuse
    flags, unknown = parser.parse_known_args(argv)
    for flag in unknown:
        raise ValueError(f"unknown argument {flag}{nearest(flag.split('=')[0].lstrip('-'), fields)}")
    if flags.config:
        try:
            loaded = yaml.safe_load(Path(flags.config).read_text()) or {}
        except (OSError, yaml.YAMLError) as e:
            raise ValueError(f"--config {flags.config}: {' '.join(str(e).split())}") from None
        if not isinstance(loaded, dict):
            raise ValueError(f"--config {flags.config}: must be lines of `key: value`")
        for name, value in loaded.items():
            if name not in fields:
                raise ValueError(f"{flags.config}: unknown key {name}{nearest(str(name), fields)}")
            put(name, value, f"{flags.config}: {name}")
    for variable, text in environ.items():
        name = variable.lower()
        if variable.isupper() and name in fields:
            put(name, text, f"environment variable {variable}")
        elif variable.startswith("JEPA_"):
            raise ValueError(f"unknown environment variable {variable}{nearest(variable, [n.upper() for n in fields])}")
        elif close := difflib.get_close_matches(variable, [n.upper() for n in fields], n=1, cutoff=0.85):
            warnings.append(f"warning: environment variable {variable} is read by nobody here; did you mean {close[0]}?")
    for name in fields:
        if getattr(flags, name) is not None:
            put(name, getattr(flags, name), f"flag --{name}")
    return Config(**values), origin, warnings
