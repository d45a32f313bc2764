r"""Resampling replaces a weighted sample by draws from it.

A *scheme* is a function ``(key, log_weights (n,), num) -> (ancestors (num,), log_weights (num,))``. It preserves the
weighted measure in expectation, including its total weight: for every function f,
:math:`E\sum_j w'_j f(x_{a_j}) = \sum_i w_i f(x_i)`. So resampling preserves the log evidence carried by the weights, a
wrapper such as "only below an effective sample size" has the same signature, and weights that are all zero stay zero. A
draw of weight zero is never chosen.

How to choose: ``systematic`` is the cheapest and usually the least variable; ``ssp`` is nearly as good and provably
converges for any order of the draws; ``killing`` moves the fewest draws; ``multinomial`` chooses independently;
``optimal`` keeps distinct draws of many candidates. *Conditional* schemes choose the other ancestors given a reference
path. The type of a scheme is in ``base``, the standard schemes are in ``points``.
"""

from probinfer.resampling.adaptation import CONDITIONAL, SCHEMES, Adaptive, adaptive, conditional, get
from probinfer.resampling.base import ConditionalScheme, Scheme
from probinfer.resampling.counts import in_place
from probinfer.resampling.pairwise import ssp
from probinfer.resampling.points import multinomial, residual, stratified, systematic
from probinfer.resampling.survival import killing
from probinfer.resampling.thinning import optimal
from probinfer.resampling.triggers import always, entropic_below, ess_below, every

__all__ = [
    "CONDITIONAL",
    "SCHEMES",
    "Adaptive",
    "ConditionalScheme",
    "Scheme",
    "adaptive",
    "always",
    "conditional",
    "entropic_below",
    "ess_below",
    "every",
    "get",
    "in_place",
    "killing",
    "multinomial",
    "optimal",
    "residual",
    "ssp",
    "stratified",
    "systematic",
]
