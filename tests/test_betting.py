"""Bets against slow NumPy, the published optimizer, and their promises: scale, freezing, dtype, no retrace."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from probinfer import betting
from tests.reference import betting as oracle

T = 40
RNG = np.random.default_rng(0)
# a drift that the noise overturns now and then, sizes that grow, zeros first: 4 particles, two leaves
SIZES = np.exp(np.linspace(-1, 1, T)) * (np.arange(T) > 1)
OUTCOMES = {
    "a": (RNG.normal(size=(T, 4, 3)) * [1.0, 30.0, 0.01] + 0.5) * SIZES[:, None, None],
    "b": (RNG.normal(size=(T, 4)) - 0.3) * SIZES[:, None],
}
MAKERS = {
    "coin": lambda norm: betting.coin(unit=0.3, norm=norm),
    "coin alpha": lambda norm: betting.coin(unit=0.3, alpha=3.0, norm=norm),
    "kt": lambda norm: betting.kt(unit=0.3, norm=norm),
}
ORACLES = {
    "coin": lambda c: oracle.coin(c, 0.3),
    "coin alpha": lambda c: oracle.coin(c, 0.3, 3.0),
    "kt": lambda c: oracle.kt(c, 0.3)[0],
}
ALL = {
    "coin": betting.coin(unit=0.3),
    "block": betting.coin(unit=0.3, norm="block"),
    "particle": betting.coin(unit=0.3, norm="particle"),
    "found": betting.coin(),
    "kt": betting.kt(unit=0.3, norm="particle"),
    "fuse": betting.fuse(unit=0.3, particles=True),
    "one fuse": betting.fuse(),
}


@jax.jit
def drive(bet, outcomes, params):
    """Displacements after every outcome, and the last state."""

    def step(carry, outcome):
        moved, state = carry
        gradient = jax.tree.map(jnp.negative, outcome)
        updates, state = bet.update(gradient, state, jax.tree.map(jnp.add, params, moved))
        moved = jax.tree.map(jnp.add, moved, updates)
        return (moved, state), moved

    zeros = jax.tree.map(jnp.zeros_like, params)
    (_, state), path = jax.lax.scan(step, (zeros, bet.init(params)), outcomes)
    return path, state


def data(dtype, scale=1.0):
    outcomes = jax.tree.map(lambda leaf: jnp.asarray(leaf * scale, dtype), OUTCOMES)
    return outcomes, jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), outcomes)


def tolerance(dtype):
    """Displacements are sums of T bets of order one."""
    return {"rtol": 1e-9, "atol": 1e-9} if dtype == jnp.float64 else {"rtol": 2e-3, "atol": 2e-4}


def particle_path(outcomes):
    """The leaves of one particle side by side, (T, 4)."""
    return lambda i: np.concatenate([outcomes["a"][:, i], outcomes["b"][:, i, None]], axis=1)


@pytest.mark.f32
@pytest.mark.parametrize("name", MAKERS)
def test_every_number_bets_for_itself(name, dtype):
    path, _ = drive(MAKERS[name]("element"), *data(dtype))
    for leaf in OUTCOMES:
        flat = OUTCOMES[leaf].reshape(T, -1)
        expected = np.concatenate([ORACLES[name](flat[:, [i]]) for i in range(flat.shape[1])], axis=1)
        np.testing.assert_allclose(path[leaf].reshape(T, -1), expected, **tolerance(dtype))


@pytest.mark.parametrize("name", MAKERS)
def test_every_leaf_bets_for_itself(name, dtype):
    path, _ = drive(MAKERS[name]("block"), *data(dtype))
    for leaf in OUTCOMES:
        expected = ORACLES[name](OUTCOMES[leaf].reshape(T, -1))
        np.testing.assert_allclose(path[leaf].reshape(T, -1), expected, **tolerance(dtype))


@pytest.mark.parametrize("name", MAKERS)
def test_every_particle_bets_for_itself(name, dtype):
    path, _ = drive(MAKERS[name]("particle"), *data(dtype))
    result, outcome_of = particle_path(path), particle_path(OUTCOMES)
    for i in range(4):
        np.testing.assert_allclose(result(i), ORACLES[name](outcome_of(i)), **tolerance(dtype))


@pytest.mark.f32
def test_fuse_of_a_cloud_and_of_one_iterate(dtype):
    cloud = np.stack([particle_path(OUTCOMES)(i) for i in range(4)], axis=1)
    path, _ = drive(betting.fuse(unit=0.3, particles=True), *data(dtype))
    result = np.stack([particle_path(path)(i) for i in range(4)], axis=1)
    np.testing.assert_allclose(result, oracle.fuse(cloud, 0.3), **tolerance(dtype))
    path, _ = drive(betting.fuse(unit=0.3), *data(dtype))
    flat = np.concatenate([OUTCOMES[leaf].reshape(T, -1) for leaf in "ab"], axis=1)
    result = np.concatenate([path[leaf].reshape(T, -1) for leaf in "ab"], axis=1)
    np.testing.assert_allclose(result, oracle.fuse(flat[:, None], 0.3)[:, 0], **tolerance(dtype))


def test_one_iterate_of_fuse_starts_as_distance_over_gradients():
    params = jnp.array([3.0, 4.0])
    assert float(betting.fuse().init(params).distance) == pytest.approx(6e-6)
    # of a cloud: the root mean square of the norms, here of 5 and 1
    assert float(
        betting.fuse(particles=True).init(jnp.array([[3.0, 4.0], [0.0, 1.0]])).distance
    ) == pytest.approx(1e-6 * (1 + 13**0.5))


BOX = 3.0


def turning(x, t):
    """Gradient of a quadratic whose minimum lies outside the box for 100 steps and inside it after that."""
    return 2 * (x - jnp.where(t < 100, 6.0, 2.0))


@jax.jit
def run_in_box(bet, x, top=BOX):
    """Iterates that are clipped after every step."""

    def step(carry, t):
        x, state = carry
        updates, state = bet.update(turning(x, t), state, x)
        x = jnp.minimum(optax.apply_updates(x, updates), jnp.asarray(top, x.dtype))
        return (x, state), x

    (_, state), path = jax.lax.scan(step, (x, bet.init(x)), jnp.arange(300))
    return path, state


IN_A_BOX = {
    "coin": (betting.coin(unit=0.3), lambda: oracle.projected_coin(turning, 300, BOX, 0.3)),
    "kt": (betting.kt(unit=0.3), lambda: oracle.projected_kt(turning, 300, BOX, 0.3)),
    "fuse": (betting.fuse(unit=0.3), lambda: oracle.projected_fuse(turning, 300, BOX, 0.3)),
}


@pytest.mark.f32
@pytest.mark.parametrize("name", IN_A_BOX)
def test_gains_are_those_of_the_moves_that_were_made(name, dtype):
    """The wall is met, no bet runs away, and no iterate is ever far from the box."""
    bet, slow = IN_A_BOX[name]
    path, _ = run_in_box(bet, jnp.zeros(1, dtype))
    assert float(path[99, 0]) == BOX
    assert float(jnp.min(path)) > -BOX
    np.testing.assert_allclose(path[:, 0], slow(), **tolerance(dtype))


@pytest.mark.f32
@pytest.mark.parametrize("name", ["coin", "kt"])
def test_a_unit_is_found_in_a_box(name, dtype):
    path, state = run_in_box({"coin": betting.coin(), "kt": betting.kt()}[name], jnp.zeros(1, dtype))
    assert float(path[99, 0]) == BOX
    assert float(jnp.max(jnp.abs(path))) == BOX
    assert float(jnp.max(jnp.abs(state.bet.displacement))) < 10
    np.testing.assert_allclose(path[-1], 2.0, atol=0.01)


def test_a_bet_within_the_rounding_of_its_parameters_is_made(dtype):
    """Where every step is below the rounding of x the iterate waits until the bets have grown, and then goes."""
    path, _ = run_in_box(betting.coin(unit=1e-3), jnp.array([-1000.0], jnp.float32))
    assert float(path[0, 0]) == pytest.approx(-1000.0, abs=2e-3)
    path, _ = run_in_box(betting.coin(unit=1e-2), jnp.array([-1000.0], jnp.bfloat16))
    assert float(path[0, 0]) == -1000.0
    assert float(path[99, 0]) == BOX


@pytest.mark.f32
@pytest.mark.parametrize("name", ["element", "found", "kt", "fuse"])
def test_displacement_and_parameters_of_low_precision_stay_together(name):
    """Parameters in bfloat16: after 300 steps they are one rounding from where the state has them."""
    bet = {"element": betting.coin(unit=0.3), "found": betting.coin()}.get(name) or {
        "kt": betting.kt(unit=0.3),
        "fuse": betting.fuse(unit=0.3),
    }[name]
    path, state = run_in_box(bet, jnp.full(4, -1.5, jnp.bfloat16), jnp.inf)
    inner = getattr(state, "bet", state)
    shown = inner.start + inner.displacement
    eps, farthest = float(jnp.finfo(jnp.bfloat16).eps), float(jnp.max(jnp.abs(path)))
    np.testing.assert_allclose(path[-1].astype(jnp.float32), shown, atol=2 * eps * farthest)
    assert farthest > 4  # the minimum at 6 was on the way


def test_without_parameters_every_move_is_believed(dtype):
    outcomes, params = data(dtype)
    bet = betting.coin(unit=0.3)
    state, moved = bet.init(params), jax.tree.map(jnp.zeros_like, params)
    for t in range(4):
        gradient = jax.tree.map(lambda leaf, t=t: -leaf[t], outcomes)
        updates, state = bet.update(gradient, state)
        moved = jax.tree.map(jnp.add, moved, updates)
    path, _ = drive(bet, outcomes, params)
    np.testing.assert_allclose(moved["a"], path["a"][3], rtol=1e-6)


def test_a_frozen_group_does_not_move_even_from_where_it_was_put():
    bet = betting.coin(unit=0.3)
    x = jnp.zeros(2)
    updates, state = bet.update(jnp.array([1.0, 1.0]), bet.init(x), x)
    position = jnp.array([5.0, -0.3])
    updates, state = bet.update(jnp.array([jnp.nan, 1.0]), state, position)
    assert float(updates[0]) == 0.0
    assert float(updates[1]) < 0.0


def badly_scaled(x):
    """Smooth, asymmetric, its curvatures 1 and 400."""
    return jnp.sum(jnp.logaddexp(0.0, x - 2)) + jnp.exp(-x[0]) + 200 * (x[1] - 1) ** 2 + jnp.sum(x**2) / 10


@jax.jit
def descend(optimizer, x):
    def step(carry, _):
        x, state = carry
        updates, state = optimizer.update(jax.grad(badly_scaled)(x), state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    return jax.lax.scan(step, (x, optimizer.init(x)), length=60)[1]


@pytest.mark.parametrize("alpha", [100.0, 0.0])
def test_equals_the_published_optimizer(alpha):
    x = jnp.array([4.0, -3.0])
    theirs = contrib.cocob(alpha=alpha, eps=1e-8)
    theirs = optax.GradientTransformation(*map(jax.tree_util.Partial, theirs))
    ours = descend(betting.coin(alpha=alpha, unit=0.5), x)
    np.testing.assert_allclose(ours, descend(theirs, x), rtol=1e-9, atol=1e-9)
    assert float(jnp.max(jnp.abs(ours - x))) > 0.05  # it moved


def test_without_a_unit_equals_its_description():
    outcomes = RNG.normal(size=200) + 0.4 * np.sign(np.sin(np.arange(200) / 15))
    params = jnp.array([-2.0])
    path, state = drive(betting.coin(), jnp.asarray(outcomes)[:, None], params)
    np.testing.assert_allclose(path[:, 0], oracle.restarts(outcomes, -2.0), rtol=1e-7, atol=1e-12)
    assert int(state.num_steps) == 200


def quadratic(c, gradient_scale, x):
    return gradient_scale * jnp.sum(
        ((x - c * jnp.array([1.0, -0.3, 2.5])) / c) ** 2 * jnp.array([1.0, 4.0, 9.0])
    )


@jax.jit
def final_loss(optimizer, c, gradient_scale):
    def step(carry, _):
        x, state = carry
        gradient = jax.grad(lambda x: quadratic(c, gradient_scale, x))(x)
        updates, state = optimizer.update(gradient, state, x)
        return (optax.apply_updates(x, updates), state), None

    x = jnp.zeros(3)
    x, _ = jax.lax.scan(step, (x, optimizer.init(x)), length=128)[0]
    return quadratic(c, 1.0, x)


@pytest.mark.f32
def test_any_scale_of_the_parameters_is_reached():
    """From zero, the minimum 1e-6 to 1e6 away, in 128 steps: the loss falls from 60 to rounding."""
    at = jnp.array([1e-6, 1e-3, 1.0, 1e3, 1e6])
    lost = jax.vmap(final_loss, (None, 0, None))(betting.coin(), at, 1.0)
    assert float(jnp.max(lost)) < 1e-9


@pytest.mark.f32
@pytest.mark.parametrize("name", ALL)
def test_the_scale_of_the_gradients_does_not_matter(name, dtype):
    path, _ = drive(ALL[name], *data(dtype))
    for scale in (2.0**-80, 2.0**80):  # squares and products would leave float32
        other, _ = drive(ALL[name], *data(dtype, scale))
        assert np.all(np.isfinite(jax.tree.leaves(other)[0]))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3 if dtype == jnp.float32 else 1e-12),
            path,
            other,
        )


@pytest.mark.parametrize("name", ["block", "fuse"])
def test_rotations_turn_the_path(name):
    turn = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    straight, _ = drive(ALL[name], jnp.asarray(OUTCOMES["a"]), jnp.zeros((4, 3)))
    turned, _ = drive(ALL[name], jnp.asarray(OUTCOMES["a"] @ turn), jnp.zeros((4, 3)))
    np.testing.assert_allclose(turned, straight @ turn, rtol=1e-9, atol=1e-9)


def test_kt_keeps_the_wealth_of_the_coin_game():
    """For outcomes of +-1 the wealth is known: 2^T times the Beta(1/2, 1/2) chance of the heads seen."""
    from scipy.special import betaln

    outcomes = np.sign(RNG.normal(size=30) + 0.5)[:, None]
    _, state = drive(betting.kt(unit=2.0), jnp.asarray(outcomes), jnp.zeros(1))
    heads = np.sum(outcomes > 0)
    log_chance = betaln(heads + 0.5, 30 - heads + 0.5) - betaln(0.5, 0.5)
    assert np.log(2.0 + float(state.gain[0])) == pytest.approx(np.log(2.0) + 30 * np.log(2) + log_chance)


@pytest.mark.parametrize("at", [-7.0, 0.01, 40.0])
def test_kt_keeps_its_regret_bound(at):
    """Mean of the iterates of |x - u|, convex with slopes of size one: regret at most the bound of corollary 5."""
    num = 400

    def step(carry, _):
        x, state = carry
        loss, slope = jax.value_and_grad(lambda x: jnp.abs(x - at))(x)
        updates, state = betting.kt(unit=1.0).update(slope, state)
        return (x + updates, state), loss

    x = jnp.zeros(())
    losses = jax.jit(lambda: jax.lax.scan(step, (x, betting.kt(unit=1.0).init(x)), length=num)[1])()
    bound = abs(at) * np.sqrt(num * np.log(1 + 24 * num**2 * at**2)) + 1
    assert float(jnp.sum(losses)) <= bound


@pytest.mark.parametrize("norm", ["element", "block", "particle"])
@pytest.mark.parametrize("unit", [None, 0.3])
@pytest.mark.parametrize("maker", [betting.coin, betting.kt])
def test_what_is_not_finite_is_frozen_and_counted(maker, unit, norm):
    """The path of a frozen group is the path without the bad step; the others do not notice."""
    outcomes, params = data(jnp.float64)
    outcomes = jax.tree.map(lambda leaf: leaf[2:14], outcomes)  # one epoch: no restart by the clock
    spoiled = {"a": outcomes["a"].at[5, 2, 1].set(jnp.nan), "b": outcomes["b"].at[5, 2].set(jnp.inf)}
    path, state = drive(maker(norm=norm, unit=unit), spoiled, params)
    unspoiled, _ = drive(maker(norm=norm, unit=unit), outcomes, params)
    moved_up = jax.tree.map(lambda leaf: jnp.concatenate([leaf[:5], leaf[6:], leaf[:1]]), outcomes)
    without, _ = drive(maker(norm=norm, unit=unit), moved_up, params)
    hit = {
        "element": {"a": np.zeros((4, 3), bool), "b": np.arange(4) == 2},
        "block": {"a": np.ones((4, 3), bool), "b": np.ones(4, bool)},
        "particle": {"a": np.arange(4)[:, None] == 2, "b": np.arange(4) == 2},
    }[norm]
    hit["a"] = np.broadcast_to(hit["a"], (4, 3)).copy()
    hit["a"][2, 1] = True
    for leaf in "ab":
        np.testing.assert_array_equal(path[leaf][5][hit[leaf]], path[leaf][4][hit[leaf]])
        expected = np.where(hit[leaf], without[leaf][-2], unspoiled[leaf][-1])
        np.testing.assert_allclose(path[leaf][-1], expected, rtol=1e-12)
    assert int(state.num_nonfinite) == {"element": 2, "block": 2, "particle": 1}[norm]


@pytest.mark.f32
def test_fuse_leaves_out_particles_that_are_not_finite(dtype):
    outcomes, params = data(dtype)
    bad = {"a": outcomes["a"].at[:, 2, 1].set(jnp.nan), "b": outcomes["b"]}
    path, state = drive(betting.fuse(unit=0.3, particles=True), bad, params)
    others = jnp.array([0, 1, 3])
    expected, _ = drive(
        betting.fuse(unit=0.3, particles=True),
        jax.tree.map(lambda leaf: leaf[:, others], outcomes),
        jax.tree.map(lambda leaf: leaf[others], params),
    )
    for leaf in "ab":
        np.testing.assert_allclose(path[leaf][:, others], expected[leaf], rtol=1e-6)
        np.testing.assert_array_equal(path[leaf][:, 2], 0)
    assert int(state.num_nonfinite) == T
    path, state = drive(betting.fuse(unit=0.3), bad, params)
    np.testing.assert_array_equal(path["b"], 0)
    assert int(state.num_nonfinite) == T


def test_a_bet_that_overflows_is_not_made():
    """A loss without a minimum: wealth doubles until the bet is no number; the iterate stays at the last one."""
    path, state = drive(betting.coin(unit=1.0), jnp.ones((1200, 1)), jnp.zeros(1))
    assert np.all(np.isfinite(path))
    assert float(path[-1, 0]) > 1e300
    assert int(state.num_nonfinite) > 0


@pytest.mark.f32
@pytest.mark.parametrize("name", ALL)
def test_dtypes(name):
    params = {"a": jnp.zeros((4, 3), jnp.bfloat16), "b": jnp.zeros(4, jnp.float32)}
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, state = jax.jit(lambda g, p: ALL[name].update(g, ALL[name].init(p), p))(gradients, params)
    assert jax.tree.map(lambda leaf: leaf.dtype, updates) == jax.tree.map(lambda leaf: leaf.dtype, params)
    floats = [leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype("float32")}
    assert all(bool(jnp.all(leaf < 0)) for leaf in jax.tree.leaves(updates))


def test_zero_gradients_move_nothing(dtype):
    outcomes, params = data(dtype, 0.0)
    for bet in ALL.values():
        path, state = drive(bet, outcomes, params)
        assert all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves(path))
        assert int(state.num_nonfinite) == 0


def test_vmap_equals_a_loop(dtype):
    outcomes, params = data(dtype)
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), outcomes)
    paths, _ = jax.vmap(drive, (None, 0, None))(ALL["particle"], both, params)
    expected, _ = drive(ALL["particle"], jax.tree.map(lambda leaf: leaf[::-1], outcomes), params)
    np.testing.assert_allclose(paths["a"][1], expected["a"], rtol=1e-12)


def test_without_jit_the_same(dtype):
    outcomes, params = data(dtype)
    outcomes = jax.tree.map(lambda leaf: leaf[:4], outcomes)
    path, _ = drive(ALL["coin"], outcomes, params)
    with jax.disable_jit():
        slow, _ = drive(ALL["coin"], outcomes, params)
    np.testing.assert_allclose(path["a"], slow["a"], rtol=1e-12)


def test_new_settings_trace_nothing(count_compiles, dtype):
    outcomes, params = data(dtype)
    for make in (lambda a: betting.coin(alpha=a, unit=a), lambda a: betting.fuse(unit=a)):
        jax.block_until_ready(drive(make(0.1), outcomes, params))
        with count_compiles() as compiles:
            jax.block_until_ready(drive(make(0.7), outcomes, params))
        assert compiles.count == 0


LINKS = {
    "chain": lambda bet: optax.chain(optax.clip_by_global_norm(1.0), bet),
    "several steps": lambda bet: optax.MultiSteps(bet, every_k_schedule=2).gradient_transformation(),
    "masked": lambda bet: optax.masked(bet, {"w": True, "b": False}),
    "partitioned": lambda bet: optax.partition(
        {"bet": bet, "still": optax.set_to_zero()}, {"w": "bet", "b": "still"}
    ),
    "if finite": lambda bet: optax.apply_if_finite(bet, 3),
    "injected": lambda bet: optax.inject_hyperparams(betting.coin)(unit=0.3),
}


@pytest.mark.f32
@pytest.mark.parametrize("link", LINKS)
def test_inside_optax(link, tmp_path):
    """Every wrapper drives a bet downhill under jit, and its state survives orbax."""
    import orbax.checkpoint as ocp

    optimizer = LINKS[link](betting.coin(unit=0.3))
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}

    def loss(params):
        return jnp.sum((params["w"] - 2) ** 2) + jnp.sum((params["b"] + 1) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        # what is masked is passed through by optax: a plain gradient, which we do not take
        updates = updates | {"b": jnp.zeros(3)} if link == "masked" else updates
        return optax.apply_updates(params, updates), state

    state, before = optimizer.init(params), float(loss(params))
    for _ in range(10):
        params, state = step(params, state)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as files:
        files.save(tmp_path / "state", args=ocp.args.StandardSave(state))
        restored = files.restore(tmp_path / "state", args=ocp.args.StandardRestore(state))
    one, other = step(params, state)[0], step(params, restored)[0]
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert float(loss(params)) < before - 1


@pytest.mark.f32
@pytest.mark.parametrize("make", [betting.coin, betting.kt, lambda: betting.fuse(unit=0.1)])
def test_optimizer_of_an_nnx_module(make):
    """An nnx optimizer takes every bet as it takes Adam, and a linear model learns."""
    from flax import nnx

    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip(10.0), make()), wrt=nnx.Param)
    X = jnp.asarray(RNG.normal(size=(50, 2)), jnp.float32)
    y = X @ jnp.array([[1.0], [-2.0]]) + 0.5

    def loss(model):
        return jnp.mean((model(X) - y) ** 2)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss)(model))

    before = float(loss(model))
    for _ in range(200):
        step(model, optimizer)
    assert float(loss(model)) < 0.02 * before


def test_last_link_of_a_chain():
    chain = optax.chain(optax.clip_by_global_norm(1.0), betting.coin(unit=0.5))
    x = jnp.array([4.0, -3.0])
    state = chain.init(x)
    updates, _ = chain.update(jax.grad(badly_scaled)(x), state, x)
    np.testing.assert_allclose(jnp.abs(updates), 0.5, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: betting.coin(norm="row"), ValueError, "'element', 'block' or 'particle', got 'row'"),
        (lambda: betting.kt(norm=""), ValueError, "norm must be"),
        (lambda: betting.coin(unit=0.0), ValueError, "positive, got 0.0"),
        (lambda: betting.kt(unit=-1), ValueError, "positive, got -1"),
        (lambda: betting.fuse(unit=float("nan")), ValueError, "positive, got nan"),
        (lambda: betting.coin(alpha=-1.0), ValueError, "must not be negative, got -1.0"),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("name", ALL)
def test_bad_parameters(name):
    with pytest.raises(TypeError, match=r"parameter 'w' must be floating point, got dtype int"):
        ALL[name].init({"w": jnp.arange(3)})
    with pytest.raises(ValueError, match="no leaves; pass a tree"):
        ALL[name].init({})


@pytest.mark.parametrize("name", ["particle", "fuse"])
@pytest.mark.parametrize("shapes", [((3, 2), (4,)), ((3,), ())])
def test_particles_without_a_common_axis(name, shapes):
    with pytest.raises(ValueError, match="must index the same particles, got shapes"):
        ALL[name].init([jnp.zeros(shape) for shape in shapes])


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"alpha": np.array(-1.0)}, ValueError),
        ({"alpha": float("nan")}, ValueError),
        ({"alpha": "x"}, TypeError),
        ({"unit": "a"}, TypeError),
        ({"unit": np.array(0.0)}, ValueError),
        ({"unit": np.ones(2)}, TypeError),
    ],
)
def test_numbers_are_checked_whatever_holds_them(settings, error):
    with pytest.raises(error, match=f"{next(iter(settings))} (is|must be) "):
        betting.coin(**settings)
