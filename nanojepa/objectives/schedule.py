"""The weight of the term over a run."""

import numpy as np


def jepa_weight(
    progress, jepa_lambda, start_frac=0.0, end_frac=1.0, warmup_frac=0.0, warmdown_frac=0.0
):
    """Lambda at this fraction of the run, or None if the term is off there.

    The term is on from start_frac until end_frac. Over the first warmup_frac of the run after
    its start, lambda rises linearly from 0; over the last warmdown_frac before its end, it falls
    linearly to 0.
    """
    if jepa_lambda == 0 or not start_frac <= progress < end_frac:
        return None
    rise = (progress - start_frac) / warmup_frac if warmup_frac else 1.0
    fall = (end_frac - progress) / warmdown_frac if warmdown_frac else 1.0
    return jepa_lambda * min(1.0, rise, fall)


def keeps_term(seed, step, ratio):
    """Whether a step computes the term at all, which happens with probability `ratio`.

    It is a function of seed and step alone, so all ranks agree. Source: random JEPA-loss dropout
    of LLM-JEPA (arXiv 2509.14252).
    """
    # The 2 keeps this stream apart from that of the data order.
    return ratio >= 1 or np.random.default_rng([seed, step, 2]).random() < ratio
