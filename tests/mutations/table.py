"""Faults to plant, one at a time: a line of the library, what it becomes, and the tests nearest to it.

A mutant is anchored by its text, which must occur once in its file, and not by its line. Each is an error that somebody
could make: a sign, a factor, a case left out, an index off by one. `python -m tests.mutations` plants them.
"""

from typing import NamedTuple

__all__ = ["MUTANTS", "Mutant"]


class Mutant(NamedTuple):
    """A fault.

    Attributes:
        file: below the package.
        old: a piece of its text that occurs once.
        new: what stands there instead.
        tests: the nearest test files or tests, below ``tests/``.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _of(file, tests, *pairs):
    return [Mutant(file, old, new, tuple(tests.split())) for old, new in pairs]


MUTANTS = [
    # Faults that once survived their nearest tests.
    *_of(
        "mcmc/adaptation/tuning.py",
        "mcmc/test_steps.py mcmc/test_posterior_sampler.py running/test_lanes.py",
        ("index - num_warmup + 1", "index - num_warmup"),
    ),
    *_of(
        "mcmc/nuts_steps.py",
        "mcmc/test_steps.py mcmc/test_posterior_sampler.py mcmc/test_transitions_joint.py",
        (
            "total = jnp.where(first, log_weight, jnp.logaddexp(half.log_weight, log_weight))",
            "total = jnp.logaddexp(half.log_weight, log_weight)",
        ),
        ("rho = momentum_sum - (first + last) / 2", "rho = momentum_sum"),
        ("return ones - completed + 1, ones", "return ones - completed, ones"),
        ("accepted = joined & (jnp.log(uniform) < half.log_weight - tree.log_weight)", "accepted = joined"),
    ),
    *_of(
        "mcmc/lanes/hmc.py",
        "mcmc/test_steps.py mcmc/test_posterior_sampler.py mcmc/test_transitions_joint.py",
        ("jnp.log(uniforms[1]) < log_acceptance_ratio", "jnp.log(uniforms[0]) < log_acceptance_ratio"),
        ("(1 + _JITTER * (2 * uniforms[0] - 1))", "(1 + _JITTER * (2 * uniforms[0]))"),
    ),
    *_of(
        "gp/approximation/updates.py",
        "gp/test_approximations.py",
        ("gain2 = (1 / variance - 1 / q.variance) / power", "gain2 = 1 / variance - 1 / q.variance"),
    ),
    *_of(
        "numerics/linalg.py",
        "numerics/test_linalg.py numerics/test_linalg.py[f32]",
        ('jnp.dtype("float32"): (-6, -3)', 'jnp.dtype("float32"): (-5, -3)'),
        ("return 2.0 * jnp.sum(jnp.log(jnp.diagonal(L)))", "return jnp.sum(jnp.log(jnp.diagonal(L)))"),
    ),
    *_of("smc/tempered/levels.py", "smc/test_tempered.py", ("result.acceptance[1:]", "result.acceptance")),
    *_of(
        "checks/calibration/bands.py",
        "checks/test_bands.py",
        ("statistic / 2, 1))", "0, 1))"),
        (
            "log_total = num_samples * np.log(num_samples) - num_samples",
            "log_total = num_samples * np.log(num_samples)",
        ),
    ),
    *_of(
        "checks/evidence.py",
        "checks/test_evidence.py",
        ("stats.t.ppf(1 - self.level / 2, len(a) - 1)", "stats.t.ppf(1 - self.level, len(a) - 1)"),
        ("self.gap < -rounding -", "self.gap < rounding -"),
    ),
    # Weights, resampling, importance.
    *_of(
        "numerics/weights.py",
        "numerics/test_weights.py",
        ("total * total / jnp.sum(scaled * scaled)", "total / jnp.sum(scaled * scaled)"),
        ("log_weights - largest - shift, largest + log_total", "log_weights - largest - shift, log_total"),
        ("remainder = 1 - jnp.sum(jnp.square(weights))", "remainder = jnp.ones_like(jnp.sum(weights))"),
        (
            "bad = jnp.any(jnp.isnan(log_weights) | (log_weights == jnp.inf))",
            "bad = jnp.any(jnp.isnan(log_weights))",
        ),
    ),
    *_of(
        "resampling/points.py",
        "resampling/test_laws.py",
        (
            "below = ends.integer + (offset < ends.fraction).astype(jnp.int32)",
            "below = ends.integer + (offset > ends.fraction).astype(jnp.int32)",
        ),
        ("fractions = expected - jnp.floor(expected)", "fractions = expected"),
    ),
    *_of(
        "resampling/triggers.py",
        "resampling/test_adaptive.py",
        ("return weights.entropic_ess(log_weights) <", "return weights.ess(log_weights) <"),
    ),
    *_of(
        "numerics/importance.py",
        "numerics/test_importance.py",
        ("return min(1 - 1 / math.log10(num_draws), 0.7)", "return 0.7"),
        ("(size * shape + 10 * 0.5) / (size + 10)", "shape"),
        ("excess = jnp.maximum(size / ess - 1, 0)", "excess = jnp.maximum(size / ess, 0)"),
        (
            ".astype(tail.dtype) + 0.5) / jnp.maximum(count, 1)",
            ".astype(tail.dtype) + 1.0) / jnp.maximum(count, 1)",
        ),
    ),
    # Kernels and Stein operators.
    *_of(
        "numerics/stein.py",
        "numerics/test_stein.py",
        ("ends = 2 * jnp.concatenate([features / scale,", "ends = jnp.concatenate([features / scale,"),
        ("return total[:, :-1] + total[:, -1:] * pushed", "return total[:, :-1] - total[:, -1:] * pushed"),
        ("count = jnp.maximum(jnp.sum(keep.astype(dtype)), 1)", "count = keep.shape[0]"),
    ),
    *_of(
        "kernels/stationary.py",
        "kernels/test_stationary.py kernels/test_laws.py",
        ("jnp.log1p(squared / (2.0 * alpha))", "jnp.log1p(squared / alpha)"),
        (
            "pair = self.features(jnp.stack([x - z, jnp.zeros_like(x)]))",
            "pair = self.features(jnp.stack([x + z, jnp.zeros_like(x)]))",
        ),
    ),
    # Samplers.
    *_of(
        "mcmc/adaptation/metric.py",
        "mcmc/test_steps.py mcmc/test_engines.py",
        (
            "curvature = -jnp.sum(position_differences * gradient_differences, axis=1)",
            "curvature = jnp.sum(position_differences * gradient_differences, axis=1)",
        ),
        (
            "((gradients @ metric.U) * (jnp.sqrt(metric.lam) - 1))",
            "((gradients @ metric.U) * (metric.lam - 1))",
        ),
    ),
    *_of(
        "vi/gaussian.py",
        "test_vi.py",
        ("return normal - _log_determinant(q.scale)", "return normal"),
        ("jnp.sum(update.log_diagonal) + entropy)", "entropy)"),
        (
            "used = index * block + jnp.arange(block) < count",
            "used = index * block + jnp.arange(block) <= count",
        ),
    ),
    # Particles.
    *_of(
        "smc/filtering/forward_pass.py",
        "smc/test_particle_filter.py smc/test_particle_gibbs.py",
        ("log_weights - log_mean + increments,", "log_weights + increments,"),
        (".at[0].set(chosen.astype(jnp.int32)).at[chosen].set(0)", ".at[0].set(chosen.astype(jnp.int32))"),
        ("log_total = log_weights + log_suffix", "log_total = log_suffix"),
    ),
    *_of(
        "smc/filtering/forward_pass.py",
        "smc/test_feynman_kac.py smc/test_nested.py",
        ("jnp.where(model.done(parents), jnp.zeros_like(increments), increments)", "increments"),
    ),
    *_of(
        "smc/smoothing/backward.py",
        "smc/test_smoothing.py",
        (
            "log_weights, parent = past_log_weights[t - 1], ancestors[t, index]",
            "log_weights, parent = past_log_weights[t], ancestors[t, index]",
        ),
        (
            "(index, path, jnp.maximum(status, step_status)), index != parent",
            "(index, path, status), index != parent",
        ),
    ),
    *_of(
        "smc/tempered/levels.py",
        "smc/test_tempered.py",
        (
            "num_moves=CHAIN_LENGTH - 1 if settings.waste_free",
            "num_moves=CHAIN_LENGTH if settings.waste_free",
        ),
        ("num_densities=count + num_particles,", "num_densities=count,"),
        (
            "positions, log_ratios = (jnp.swapaxes(x, 0, 1) for x in (result.positions, result.log_ratios))",
            "positions, log_ratios = jnp.swapaxes(result.positions, 0, 1), result.log_ratios",
        ),
    ),
    # Coins.
    *_of(
        "coin/cloud/geometry.py",
        "coin/test_geometry.py",
        (
            "return Metric(metric.center + metric.factor * mean, metric.factor * spread), (z - mean) / spread",
            "return Metric(metric.center + mean, metric.factor * spread), (z - mean) / spread",
        ),
        ("return scores @ metric.factor\n", "return scores @ metric.factor.T\n"),
        ("shrinkage = min(1.0, num_dims / num_particles)", "shrinkage = 0.0"),
    ),
    *_of(
        "coin/cloud/bandwidth.py",
        "coin/test_bandwidth.py",
        ("(bits <= middle) & mask) >= rank", "(bits <= middle) & mask) > rank"),
        ("square / math.log(num_particles + 1)", "square / math.log(num_particles)"),
    ),
    *_of(
        "betting/coins.py",
        "test_betting.py",
        ("jnp.maximum(r + g, 0)", "r + g"),
        (
            "share = jnp.maximum(length + safe_largest, min_length)",
            "share = length + safe_largest",
        ),
    ),
    *_of(
        "betting/units.py",
        "test_betting.py",
        ("_SHARE = 0.25", "_SHARE = 1.0"),
        ("remainder = jax.tree.map(jnp.subtract, actual, state.bet.displacement)", "remainder = actual"),
    ),
    *_of(
        "betting/moves.py",
        "test_betting.py",
        ("<= _ROUNDING * eps * magnitude, bet, displacement)", "< 0, bet, displacement)"),
        (
            "updates = groups.select_leaves(norm, usable, updates, groups.zeros(updates))",
            "updates = groups.select_leaves(norm, usable, updates, updates)",
        ),
    ),
    *_of(
        "betting/krichevsky_trofimov.py",
        "test_betting.py",
        ("/ (t + 1), unit, gain, count)", "/ jnp.maximum(t, 1), unit, gain, count)"),
    ),
    # Gaussian processes.
    *_of(
        "gp/approximation/updates.py",
        "gp/test_approximations.py gp/test_condition.py",
        (
            "gain1 = (mean / variance - q.mean / q.variance) / power",
            "gain1 = mean / variance - q.mean / q.variance",
        ),
        ("new = jnp.stack([first - second * q.mean, -second])", "new = jnp.stack([first, -second])"),
        ("dvariance = -(squared @ delta[1])", "dvariance = squared @ delta[1]"),
    ),
    *_of(
        "gp/approximation/objectives.py",
        "gp/test_approximations.py gp/test_evidence_surface.py gp/test_golden.py",
        ("0.5 * lam2 * (mean * mean + variance)", "0.5 * lam2 * mean * mean"),
        ("lam1, lam2, power, num_nodes, nodes) / power", "lam1, lam2, power, num_nodes, nodes)"),
    ),
    *_of(
        "gp/model/likelihoods/counts.py",
        "gp/test_likelihoods.py gp/test_predictive_outputs.py",
        ("rate + rate**2 * jnp.expm1(variance)\n", "rate + rate * jnp.expm1(variance)\n"),
        ("rate = _exp(m + 0.5 * v)", "rate = _exp(m)"),
        ("return gammaincc(y + 1, _exp(f))", "return gammaincc(y, _exp(f))"),
    ),
    # Checks.
    *_of(
        "checks/calibration/ranks.py",
        "checks/test_ranks.py",
        ("below + generator(key_ties).integers(ties + 1), -1)", "below, -1)"),
        ("thin - 1 :: thin]", "::thin]"),
    ),
    *_of(
        "checks/discrepancy/kernel_stein.py",
        "checks/test_ksd.py",
        ("null = (np.asarray(sums.forms) + trace) / size**2", "null = np.asarray(sums.forms) / size**2"),
        ("flip = min(0.5, 1 / (_SIGN_CORRELATION_TIMES * time))", "flip = 0.5"),
    ),
    # Language models.
    *_of(
        "lm/rewards/meanings.py",
        "lm/test_rewards.py lm/test_weighting.py lm/test_infer.py",
        ("change = jnp.where(dead, -jnp.inf, value - jnp.where(dead, 0, last))", "change = value"),
        (
            'return log_value("logit", last * self.temperature.astype(last.dtype))',
            'return log_value("logit", last)',
        ),
        (
            "(self.power.astype(view.step_log_prob.dtype) - 1) * view.step_log_prob",
            "self.power.astype(view.step_log_prob.dtype) * view.step_log_prob",
        ),
    ),
    *_of(
        "lm/generation/stepping.py",
        "lm/test_stepping.py lm/test_weighting.py",
        (
            "return log_prior, log_softmax(base + log_potentials), log_potentials",
            "return log_prior, base, log_potentials",
        ),
        ("jnp.where(agrees, log_weight[0], -jnp.inf)", "log_weight[0]"),
    ),
    *_of(
        "lm/models/transformer/attention.py",
        "lm/test_transformer.py lm/test_cache.py",
        ("mask &= q - k < window\n", "mask &= q - k <= window\n"),
        (
            "largest = jnp.maximum(largest, jnp.max(shared_scores, axis=-1))",
            "largest = jnp.max(shared_scores, axis=-1)",
        ),
    ),
    *_of(
        "lm/models/transformer/rope.py",
        "lm/test_transformer.py lm/test_checkpoints.py",
        (
            "growth = rope.factor * max(length or 0, context) / context - (rope.factor - 1)",
            "growth = rope.factor",
        ),
        ("first, last = math.floor(first), math.ceil(last)", "first, last = round(first), round(last)"),
    ),
    *_of(
        "core/identity/functions.py",
        "core/test_identity.py",
        ("            code.co_code,\n", ""),
        ("            code.co_names,\n", ""),
        ("            tuple(_constant(constant) for constant in code.co_consts),\n", ""),
        ("walk.visit(fn.__kwdefaults__)", "walk.visit(None)"),
        (
            "if name in found.changed and isinstance(value, _CONTAINERS):\n        walk.feed",
            "if False:\n        walk.feed",
        ),
    ),
    *_of(
        "core/identity/structure.py",
        "core/test_identity.py",
        ("self.digest not in _LOOKED_AT or self._same_values(other)", "True"),
        ("if before not in (None, digest):", "if False:"),
        ("if self._check is not None and self._check() != self.digest:", "if False:"),
    ),
    *_of(
        "core/binding.py",
        "core/test_identity.py",
        ("return jnp.array(array)", "return jax.device_put(array)"),
        ("return (obj.data,), obj.structure.with_values(obj.data)", "return (obj.data,), obj.structure"),
    ),
]
