"""The threshold at which to clip gradients, from the norms that training has seen."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from throughtime.errors import ThroughtimeError


def suggest_clip(norms: Iterable[float], quantile: float = 0.9) -> float:
    """The norm of all gradients together at which to clip: this quantile of the norms seen, so that most steps stay.

    A quantile of what was seen follows Seetharaman et al. 2020 (AutoClip, arXiv:2007.14469); Pascanu et al. 2013
    (arXiv:1211.5063) take from half to ten times the mean norm, but a single explosion moves a mean. A norm that is
    infinite or NaN is an explosion and counts as larger than all others.

    Raises ThroughtimeError where there are no norms, where one is negative, where the quantile is not between 0 and 1,
    and where it falls on nothing but zeros or on an explosion, so that no threshold can be told.
    """
    seen = np.array([math.inf if math.isnan(norm) else norm for norm in map(float, norms)])
    if not 0 < quantile < 1:
        raise ThroughtimeError(f"the quantile is {quantile!r}; give a number between 0 and 1, such as 0.9")
    if not len(seen):
        raise ThroughtimeError("no gradient norm has been seen, so none can be suggested; train some steps first")
    if (seen < 0).any():
        raise ThroughtimeError(f"a gradient norm is {seen.min():g}; norms are not negative: give norms, not gradients")
    threshold = float(np.quantile(seen, quantile, method="higher"))
    if not 0 < threshold < math.inf:
        what = "zero" if threshold == 0 else "infinite or NaN"
        raise ThroughtimeError(
            f"{quantile:.0%} of {len(seen)} gradient norms reach a value that is {what}, which is no threshold; "
            + ("see why nothing is learnt" if threshold == 0 else "lower the learning rate, or clip at 1.0")
        )
    return threshold
