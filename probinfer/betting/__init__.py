r"""Bets without a learning rate, as optax transformations of the gradients of a loss.

A bettor starts with a wealth, bets a signed share of it on every outcome :math:`c = -\nabla f` and moves by its bet:
the displacement from the start *is* the bet. It wins as long as outcomes agree, and its wealth, hence its reach, then
doubles every step; no step size is chosen. What is left is a unit of length, the first bet. ``coin`` is the bettor of
coin sampling and of COCOB, ``kt`` the one with the classical guarantee, ``fuse`` the distance-over-gradients rule of
one iterate or of a cloud. ``coin`` and ``kt`` find the unit themselves if none is given.

Every transformation keeps its displacement in its state and emits the update that leads there: it should be the last
link of an ``optax.chain``. What it wins is counted from where the parameters are, if they are given to ``update``:
parameters may be clipped or projected after every step, and may be of low precision. The transformations are those of
optax: ``MultiSteps``, ``masked``, ``nnx.Optimizer`` and checkpoints take them. Gradients that are not finite freeze
what they belong to, its state included, and are counted in ``state.num_nonfinite``.

Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from probinfer import betting
    >>> optimiser = betting.coin()
    >>> loss = lambda x: jnp.sum((x - 1e4) ** 2)
    >>> x = jnp.zeros(3)
    >>> state = optimiser.init(x)
    >>> for _ in range(100):
    ...     updates, state = optimiser.update(jax.grad(loss)(x), state, x)
    ...     x = optax.apply_updates(x, updates)
    >>> bool(jnp.allclose(x, 1e4))
    True
"""

from probinfer.betting.coins import CoinState, coin
from probinfer.betting.distance_over_gradients import FuseState, fuse
from probinfer.betting.krichevsky_trofimov import KTState, kt
from probinfer.betting.units import RestartState

__all__ = ["CoinState", "FuseState", "KTState", "RestartState", "coin", "fuse", "kt"]
