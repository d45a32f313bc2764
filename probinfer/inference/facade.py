"""``infer``: any target through any engine."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from probinfer.core.errors import ConvergenceWarning, NumericalError, shortened
from probinfer.core.status import Status
from probinfer.core.types import PRNGKey
from probinfer.inference.engine import Engine
from probinfer.inference.posterior import Posterior
from probinfer.mcmc import NUTS
from probinfer.running.checkpoint import Checkpoint
from probinfer.targets.undefined import advice_on_constraints

__all__ = ["Engine", "infer"]


def infer(
    key: PRNGKey,
    target: Any,
    engine: Engine | None = None,
    *,
    progress: bool | str | None = None,
    checkpoint: Checkpoint | None = None,
) -> Posterior:
    """Draw from a posterior: ``engine.sample(key, target)``.

    Args:
        key: one random key, ``jax.random.key(seed)``.
        target: what ``targets.from_numpyro`` or ``targets.from_logdensity`` made, or what the engine takes
            (``smc.Parameters`` for ``smc.PMMH``).
        engine: ``None`` means ``mcmc.NUTS()``.
        progress: a bar; ``None`` means on a terminal.
        checkpoint: where to keep checkpoints, for engines that make some.

    Returns:
        The posterior.

    Raises:
        TypeError: the key, target or engine is not one, or the engine cannot use this target.
        NumericalError: the engine found no finite starting point or ended at a non-finite state.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import probinfer as pi
        >>> def log_normal_density(values):
        ...     return -0.5 * jnp.sum((values["x"] - 3.0) ** 2)
        >>> target = pi.targets.from_logdensity(log_normal_density, {"x": jnp.zeros(2)})
        >>> posterior = pi.infer(jax.random.key(0), target, progress=False)
        >>> posterior.draws["x"].shape
        (4, 1000, 2)
    """
    chosen: Any = NUTS() if engine is None else engine
    if isinstance(chosen, type) or not isinstance(chosen, Engine):
        raise TypeError(
            f"engine must have sample(key, target), such as mcmc.NUTS() or vi.MeanField(); got {shortened(chosen)}"
            + (f"; call it: {chosen.__name__}()" if isinstance(chosen, type) else "")
        )
    Checkpoint.check(checkpoint)
    try:
        posterior = chosen.sample(key, target, progress=progress, checkpoint=checkpoint)
    except NumericalError as error:
        if hint := advice_on_constraints(target):
            raise NumericalError(f"{hint}. {error}", error.status) from error
        raise
    status = getattr(posterior.info, "status", Status.OK)
    if np.max(np.asarray(status)) > int(Status.OK) and (hint := advice_on_constraints(target)):
        warnings.warn(hint, ConvergenceWarning, stacklevel=2)
    return posterior
