r"""One answer from many particles, however they were sampled.

A particle n has an answer a_n (None if its text has none), a weight and perhaps a score. The posterior probability of
an answer is the mass of the particles that give it,

.. math:: P(a) = \sum_n W_n 1[a_n = a],

which is what ``posterior_vote`` ranks; the other selectors are the usual heuristics. All run on the host. Ties go to
the answer, or the particle, that comes first among the particles; sums are exactly rounded, so the order of addition
never decides a tie.

References:
    Wang et al. (2023), self-consistency; Li et al. (2023), votes weighted by a verifier; Aggarwal et al. (2023),
    adaptive consistency: the stopping rule of ``decided``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import special

from probinfer.core.arguments import check_key
from probinfer.core.errors import shortened
from probinfer.core.types import PRNGKey

__all__ = [
    "Choice",
    "Decision",
    "Vote",
    "argmax",
    "decided",
    "majority",
    "posterior_vote",
    "sample",
    "weighted_vote",
]


class Vote(NamedTuple):
    """Shares of the answers.

    Attributes:
        ranking: pairs of an answer and its share, the largest share first; None is not among them.
        unanswered: share of the particles without an answer. All shares and this one sum to one; NaN, with an empty
            ranking, if every weight is zero.
    """

    ranking: tuple[tuple[str, float], ...]
    unanswered: float

    @property
    def answer(self) -> str | None:
        """The answer with the largest share, None if there is no answer."""
        return self.ranking[0][0] if self.ranking else None

    @property
    def probability(self) -> float:
        """Its share, out of all particles; 0 if there is no answer."""
        return self.ranking[0][1] if self.ranking else 0.0


class Choice(NamedTuple):
    """One particle and its answer.

    Attributes:
        answer: its answer, None if it has none.
        particle: its index; -1 if every weight is zero.
    """

    answer: str | None
    particle: int


class Decision(NamedTuple):
    """Whether more samples could still change the vote.

    Attributes:
        stop: whether the probability has reached the confidence.
        probability: posterior probability that the leader is more probable than the runner-up.
        leader: the answer with the largest share, None if there is none.
        runner_up: the answer with the next largest share, None if there is none.
        num_effective: number of independent votes that the answered particles are worth.
    """

    stop: bool
    probability: float
    leader: str | None
    runner_up: str | None
    num_effective: float


def posterior_vote(answers: Sequence[Any], log_weights: Any) -> Vote:
    r"""The posterior probability of each answer, :math:`\sum_n W_n 1[a_n = a]`.

    Args:
        answers: (N,) strings or None.
        log_weights: (N,), not normalized; minus infinity for dead particles.

    Returns:
        The vote.

    Raises:
        TypeError: an answer is neither a string nor None.
        ValueError: other lengths than N; NaN or infinite weights.

    Example:
        >>> import numpy as np
        >>> from probinfer.lm import selectors
        >>> vote = selectors.posterior_vote(["7", "3", None, "7"], np.log([1, 5, 2, 2]))
        >>> vote.answer, [(answer, round(share, 2)) for answer, share in vote.ranking], round(vote.unanswered, 2)
        ('3', [('3', 0.5), ('7', 0.3)], 0.2)
    """
    return _vote(answers, _relative(answers, log_weights))


def majority(answers: Sequence[Any]) -> Vote:
    """Return the share of each answer, with particles counted equally: right for independent samples.

    Args:
        answers: (N,) strings or None.

    Returns:
        The vote.

    Raises:
        TypeError: an answer is neither a string nor None.
        ValueError: no answers.
    """
    return _vote(answers, np.ones(len(answers)))


def weighted_vote(answers: Sequence[Any], scores: Any) -> Vote:
    r"""Return the share of each answer in the sum of scores, :math:`\sum_n r_n 1[a_n = a] / \sum_n r_n`.

    Args:
        answers: (N,) strings or None.
        scores: (N,) numbers r that are not negative, such as final probabilities of a reward model.

    Returns:
        The vote.

    Raises:
        TypeError: an answer is neither a string nor None.
        ValueError: other lengths than N; a score that is negative, NaN or infinite.
    """
    scores = _as_numbers("scores", answers, scores)
    if not (np.isfinite(scores) & (scores >= 0)).all():
        raise ValueError(
            f"a weighted vote needs finite scores that are not negative, got {shortened(scores.tolist())}; "
            "take probabilities, not logits"
        )
    return _vote(answers, scores)


def argmax(answers: Sequence[Any], values: Any) -> Choice:
    """Choose the answered particle with the largest value: best-of-N, by score or by weight.

    A particle without an answer is chosen only if no other has a value above minus infinity.

    Args:
        answers: (N,) strings or None.
        values: (N,) scores or log weights; minus infinity excludes a particle.

    Returns:
        The particle, the first of equal ones.

    Raises:
        TypeError: an answer is neither a string nor None.
        ValueError: other lengths than N; NaN values.
    """
    values = _as_numbers("values", answers, values)
    if np.isnan(values).any():
        raise ValueError(f"values must not be NaN, got {shortened(values.tolist())}")
    answered = np.array([answer is not None for answer in answers]) & (values > -np.inf)
    if answered.any():
        index = int(np.argmax(np.where(answered, values, -np.inf)))
        return Choice(answers[index], index)
    index = int(np.argmax(values))
    return Choice(None, index if values[index] > -np.inf else -1)


def sample(key: PRNGKey, answers: Sequence[Any], log_weights: Any) -> Choice:
    """Draw one particle in proportion to its weight: an exact draw from the posterior that the particles represent.

    Args:
        key: random key.
        answers: (N,) strings or None.
        log_weights: (N,), not normalized; minus infinity for dead particles.

    Returns:
        The particle; it may have no answer.

    Raises:
        TypeError: an answer is neither a string nor None; the key is not a typed key.
        ValueError: other lengths than N; NaN or infinite weights.
    """
    check_key(key)
    weights = _relative(answers, log_weights)
    sums = np.cumsum(weights)
    if not sums[-1]:
        return Choice(None, -1)
    index = int(np.searchsorted(sums, float(jax.random.uniform(key)) * sums[-1], side="right"))
    index = min(index, int(np.flatnonzero(weights)[-1]))  # rounding must not reach a particle of weight zero
    return Choice(answers[index], index)


def decided(
    answers: Sequence[Any], log_weights: Any = None, *, confidence: Any = 0.95, num_effective: Any = None
) -> Decision:
    r"""Return the probability that the leader of the vote stays ahead as more independent samples are drawn.

    With v1 and v2 votes for the leader and the runner-up and a uniform Dirichlet prior over answers, the share of the
    leader among the two has the distribution Beta(v1 + 1, v2 + 1), so

    .. math:: P(p_1 > p_2 | v) = P(B > 1/2) = I_{1/2}(v_2 + 1, v_1 + 1).

    Votes with weights count as :math:`v_a = n P(a)` with the effective sample size
    :math:`n = (\sum W)^2 / \sum W^2` of the answered particles. This assumes independent particles: after resampling
    many descend from one, and ``num_effective`` should be the number of those that do not.

    Args:
        answers: (N,) strings or None; particles without an answer have no vote.
        log_weights: (N,), not normalized; None: equal ones.
        confidence: stop if the probability is at least this.
        num_effective: number of independent votes that the answered particles are worth, instead of n.

    Returns:
        The decision; the probability is 0 if there is no answer.

    Raises:
        TypeError: an answer is neither a string nor None.
        ValueError: a confidence outside of (1/2, 1); ``num_effective`` negative; other lengths than N; NaN weights.

    References:
        Aggarwal et al. (2023), the Beta stopping criterion.
    """
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence must lie between 1/2 and 1, got {confidence}")
    if num_effective is not None and not 0 <= num_effective < math.inf:
        raise ValueError(f"num_effective must be finite and not negative, got {num_effective}")
    weights = _relative(answers, np.zeros(len(answers)) if log_weights is None else log_weights)
    weights = np.where([answer is not None for answer in answers], weights, 0.0)
    total = math.fsum(weights)
    if not total:
        return Decision(stop=False, probability=0.0, leader=None, runner_up=None, num_effective=0.0)
    size = total**2 / math.fsum(weights**2) if num_effective is None else float(num_effective)
    (leader, first), (runner_up, second) = (*_vote(answers, weights).ranking, (None, 0.0))[:2]
    probability = float(special.betainc(size * second + 1, size * first + 1, 0.5))
    return Decision(
        stop=probability >= confidence,
        probability=probability,
        leader=leader,
        runner_up=runner_up,
        num_effective=size,
    )


def _vote(answers: Sequence[Any], weights: np.ndarray) -> Vote:
    """Return the shares of weights that are not negative; equal shares in the order of the particles."""
    _as_numbers("weights", answers, weights)
    masses: dict[Any, list[float]] = {}
    for answer, weight in zip(answers, weights, strict=True):
        masses.setdefault(answer, []).append(float(weight))
    total = math.fsum(weights)
    if not total:
        return Vote((), math.nan)
    shares = {answer: math.fsum(parts) / total for answer, parts in masses.items()}
    unanswered = shares.pop(None, 0.0)
    ranking = sorted(shares.items(), key=lambda pair: -pair[1])  # stable
    return Vote(tuple(pair for pair in ranking if pair[1] > 0), unanswered)


def _relative(answers: Sequence[Any], log_weights: Any) -> np.ndarray:
    """Return weights divided by the largest of them; zeros if every weight is zero."""
    log_weights = _as_numbers("log_weights", answers, log_weights)
    if (np.isnan(log_weights) | (log_weights == np.inf)).any():
        raise ValueError(
            f"log_weights must be finite or minus infinity, got {shortened(log_weights.tolist())}"
        )
    largest = log_weights.max()
    return np.exp(log_weights - (largest if largest > -np.inf else 0.0))


def _as_numbers(name: str, answers: Sequence[Any], values: Any) -> np.ndarray:
    """Return values as floats (N,), one for each answer."""
    if isinstance(answers, str) or not all(answer is None or isinstance(answer, str) for answer in answers):
        raise TypeError(f"answers must be strings or None, got {shortened(answers)}")
    values = np.asarray(values, float)
    if not len(answers):
        raise ValueError("there are no answers to choose from")
    if values.shape != (len(answers),):
        raise ValueError(
            f"{name} must be one number for each answer, ({len(answers)},); got shape {values.shape}"
        )
    return values
