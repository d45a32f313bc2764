r"""Optimizers without a learning rate that bet on gradients, as optax transformations.

A bettor starts with some wealth, bets a signed share of it on every outcome :math:`c = -\nabla f` and moves by its bet:
the displacement from the start *is* the bet. While the outcomes agree it wins, and its wealth, and with it its reach,
doubles every step; no step size is chosen. The only scale left is a unit of length, the first bet. ``coin`` is the
bettor of coin sampling and of COCOB, ``kt`` the one with the classical guarantee, and ``fuse`` the
distance-over-gradients rule for one iterate or a cloud of particles. ``coin`` and ``kt`` estimate the unit if none is
given.

Every transformation keeps its displacement in its state and emits the update that leads there, so it should be the last
link of an ``optax.chain``. If the parameters are passed to ``update``, winnings are computed from where they are: they
may be clipped or projected after every step, and may have low precision. The transformations work with ``MultiSteps``,
``masked``, ``nnx.Optimizer`` and checkpoints. A gradient that is not finite freezes the group that it belongs to and
the state of this group, and is counted in ``state.num_nonfinite``.

Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from probinfer import betting
    >>> optimizer = betting.coin()
    >>> loss = lambda x: jnp.sum((x - 1e4) ** 2)
    >>> x = jnp.zeros(3)
    >>> state = optimizer.init(x)
    >>> for _ in range(100):
    ...     updates, state = optimizer.update(jax.grad(loss)(x), state, x)
    ...     x = optax.apply_updates(x, updates)
    >>> bool(jnp.allclose(x, 1e4))
    True
"""

from probinfer.betting.coins import CoinState, coin
from probinfer.betting.distance_over_gradients import FuseState, fuse
from probinfer.betting.krichevsky_trofimov import KTState, kt
from probinfer.betting.units import RestartState

__all__ = ["CoinState", "FuseState", "KTState", "RestartState", "coin", "fuse", "kt"]
