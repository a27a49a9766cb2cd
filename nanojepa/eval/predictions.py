"""A file of predictions: a line with all that they depend on, then a line for each question.

A run that was stopped goes on after the lines that are there.
"""

import json
import os


def open_output(path, header):
    """{line: its prediction} of a file of predictions, which can be appended to then.

    It is begun with the header, or must have the same one. ValueError names a damaged line.
    """
    first = json.dumps(header).encode() + b"\n"
    there = path.read_bytes() if path.exists() else b""
    whole = there[: there.rfind(b"\n") + 1]  # a run that was killed may have torn its last line
    if not whole and first.startswith(there):
        path.write_bytes(first)
        return {}
    if not whole.startswith(first):
        raise ValueError(
            f"{path} isn't of this model, data, task and flags; choose another --output, or remove "
            "it"
        )
    done = {}
    for number, line in enumerate(whole.split(b"\n")[1:-1], 2):
        try:
            prediction = json.loads(line)
            done[prediction["line"]] = prediction
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path}, line {number}: no prediction; remove the line, choose another --output, "
                "or remove it"
            ) from None
    os.truncate(path, len(whole))
    return done
