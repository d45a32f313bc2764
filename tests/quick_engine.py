"""An engine for tests of what stands around engines: it compiles quickly and is wrong."""

import warnings
from typing import Any, NamedTuple

import jax

from probinfer.core.status import Status
from probinfer.inference.posterior import Posterior


class CloudInfo(NamedTuple):
    rhat: Any
    ess: Any
    ess_tail: Any
    status: Any


class Cloud:
    """An engine that compiles quickly: draws from the prior in place of chains, in need of a warning."""

    def sample(self, key, target, *, progress=None, checkpoint=None):
        draws = jax.vmap(target.constrain)(target.init(key, 40))
        warnings.warn("these are prior draws", UserWarning, stacklevel=1)
        one = jax.tree.map(lambda leaf: leaf[0], draws)
        info = CloudInfo(one, jax.tree.map(lambda leaf: leaf + 50, one), one, int(Status.CHAINS_DISAGREE))
        return Posterior(jax.tree.map(lambda leaf: leaf.reshape(2, 20, *leaf.shape[1:]), draws), info=info)
