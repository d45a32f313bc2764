"""Point estimates of the hyperparameters.

``ML2`` maximizes the evidence p(y | θ) (type-II maximum likelihood), ``MAP`` the posterior density. Both are engines,
which return a posterior with a single draw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

from probinfer.core.algorithms import as_partial
from probinfer.core.types import PRNGKey, field, pytree
from probinfer.inference import engine
from probinfer.inference.posterior import Posterior
from probinfer.running.checkpoint import Checkpoint
from probinfer.targets import Target
from probinfer.vi import MAP
from probinfer.vi.point import point_posterior

__all__ = ["MAP", "ML2"]


@pytree
class ML2:
    """Type-II maximum likelihood: argmax over θ of p(y | θ), by L-BFGS from several starts.

    The first start is the model itself; the others are drawn from the prior, which has no other role.

    Attributes:
        num_restarts: number of starting points; the best end is returned.
        max_steps: maximum number of L-BFGS steps from each start.
        mode: starts one after another (``"map"``), vectorized (``"vmap"``), or as suits the device (``"auto"``).

    References:
        Rasmussen and Williams (2006), Gaussian Processes for Machine Learning, section 5.4.1.
    """

    num_restarts: int = field(static=True, default=4)
    max_steps: int = field(static=True, default=1000)
    mode: str = field(static=True, default="auto")

    def objective(self, target: Target) -> Callable:
        """The function that is maximized: a ``Partial`` of the unconstrained position.

        Args:
            target: an exact target whose log likelihood is known.
        """
        return as_partial(cast(Callable, target.log_likelihood_fn))

    def sample(
        self,
        key: PRNGKey,
        target: Target,
        *,
        progress: bool | str | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Posterior:
        """Find the maximum of the likelihood of an exact target; ``checkpoint`` is not used, as the search is short.

        Returns:
            A posterior with one chain of one draw; ``info.log_density`` is the log likelihood there.

        Raises:
            TypeError: not a target with a ``log_likelihood_fn``.
            NumericalError: no start ended at a finite log likelihood.
        """
        engine.check_target(key, target, "ML2")
        if target.log_likelihood_fn is None:
            raise TypeError(
                "ML2 needs a target whose log likelihood is known apart from the prior; use vi.MAP()"
            )
        posterior, _ = point_posterior("ML-II", key, target, self.objective(target), self, progress)
        info = posterior.info._replace(log_likelihood=posterior.info.log_density)
        return dataclasses.replace(posterior, info=info)
