r"""Have the chains mixed, and how many independent draws are they worth?

Every function takes draws with leaves (chain, draw, ...) and returns the same tree with one number a quantity
(leaves ...), computed for each scalar apart. Chains are split in half (the middle draw of an odd number is
dropped); draws are replaced by normal scores of their ranks, ties by their average rank, so that heavy tails
do no harm. A quantity that never changes, draws that are NaN or infinite and chains of fewer than four draws
have no diagnostics: NaN. Many short chains are judged by the nested R-hat, which splits nothing and asks for one draw.

References:
    Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021), "Rank-normalization, folding, and localization", sections
    3 (R-hat, ESS) and 4 (ranks, folding, tails, errors of quantiles, thresholds). Margossian, Hoffman, Sountsov,
    Riou-Durand, Vehtari and Gelman (2024), "Nested R-hat".
"""

from probinfer.inference.diagnostics.chains import (
    convergence_status,
    ebfmi,
    ess,
    ess_mean,
    ess_quantile,
    ess_tail,
    mcse_mean,
    mcse_quantile,
    mcse_sd,
    rhat,
)
from probinfer.inference.diagnostics.nested import nested_rhat

__all__ = [
    "convergence_status",
    "ebfmi",
    "ess",
    "ess_mean",
    "ess_quantile",
    "ess_tail",
    "mcse_mean",
    "mcse_quantile",
    "mcse_sd",
    "nested_rhat",
    "rhat",
]
