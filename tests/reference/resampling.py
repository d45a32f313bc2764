"""The exact law of the offspring counts of every scheme, by enumeration: dicts from counts to probability."""

from collections import defaultdict
from itertools import pairwise, permutations, product

import numpy as np
from scipy import stats

ORDERED = {"stratified", "systematic", "ssp"}  # their conditional forms put the draws in a random order


def law(name, weights, num):
    """P(O = o) for normalized weights in the order given."""
    found = defaultdict(float)
    for counts, probability in LAWS[name](np.asarray(weights, float), num):
        if probability > 0:
            found[tuple(int(count) for count in counts)] += probability
    return dict(found)


def conditional_law(name, weights, num):
    """P(O = o given that the slot of the reference, draw 0, descends from it) = P(o) o_0 / (num W_0)."""
    size = len(weights)
    orders = list(permutations(range(size))) if name in ORDERED else [tuple(range(size))]
    found = defaultdict(float)
    for order in orders:
        for counts, probability in law(name, np.asarray(weights)[list(order)], num).items():
            back = tuple(counts[order.index(i)] for i in range(size))
            found[back] += probability * back[0] / (num * weights[0]) / len(orders)
    return {counts: probability for counts, probability in found.items() if probability > 0}


def independent(rows):
    """Counts of independent choices, row j the probabilities of choice j."""
    rows = np.asarray(rows, float)
    size = rows.shape[1]
    for choice in product(range(size), repeat=len(rows)):
        yield (
            np.bincount(choice, minlength=size),
            np.prod([row[i] for row, i in zip(rows, choice, strict=True)]),
        )


def multinomial(weights, num):
    yield from independent(np.tile(weights, (num, 1)))


def stratified(weights, num):
    ends = np.concatenate([[0.0], np.cumsum(weights) * num])
    cells = [np.clip(np.diff(np.clip(ends, j, j + 1)), 0, None) for j in range(num)]
    yield from independent(cells)


def systematic(weights, num):
    yield from _systematic(np.asarray(weights) * num)


def _systematic(expected):
    ends = np.concatenate([[0.0], np.cumsum(expected)])
    breaks = np.unique(np.concatenate([[0.0, 1.0], ends % 1]))
    for low, high in pairwise(breaks):
        below = np.ceil(ends - (low + high) / 2)
        if high - low > 1e-12:
            yield np.diff(below), high - low


def residual(weights, num):
    expected = np.asarray(weights) * num
    copies = np.floor(expected + 1e-12)
    fractions = np.clip(expected - copies, 0, None)
    rest = num - int(copies.sum())
    rows = (
        np.tile(fractions / max(fractions.sum(), 1e-300), (rest, 1)) if rest else np.zeros((0, len(weights)))
    )
    for counts, probability in independent(rows):
        yield copies + counts, probability


def killing(weights, num):
    survive = weights / weights.max()
    yield from independent(np.diag(survive) + (1 - survive)[:, None] * weights[None, :])


def ssp(weights, num):
    expected = np.asarray(weights) * num
    copies = np.floor(expected + 1e-12)
    for ones, probability in _pairs(list(np.clip(expected - copies, 0, None)), 0, 1):
        yield copies + np.round(ones), probability


def _pairs(fractions, opened, incoming):
    """All outcomes of the pairwise rounding, from the particle that is open and the one that comes."""
    if incoming == len(fractions):
        yield np.array(fractions), 1.0
        return
    a, b = fractions[opened], fractions[incoming]
    if a + b <= 1:
        closed, rest, stay = 0.0, a + b, a / (a + b) if a + b else 1.0
    else:
        closed, rest, stay = 1.0, a + b - 1, (1 - a) / (2 - a - b)
    for first, second, now, chance in ((rest, closed, opened, stay), (closed, rest, incoming, 1 - stay)):
        if chance > 0:
            after = list(fractions)
            after[opened], after[incoming] = first, second
            for outcome, probability in _pairs(after, now, incoming + 1):
                yield outcome, chance * probability


def threshold(weights, num):
    """c with sum of min(w / c, 1) = num, by trying how many are kept; 0 if no more than num are positive."""
    descending = np.sort(weights)[::-1]
    if np.sum(weights > 0) <= num:
        return 0.0
    for kept in range(num):
        c = descending[kept:].sum() / (num - kept)
        if descending[kept] <= c * (1 + 1e-12):
            return c
    raise AssertionError("there is always a threshold")


def optimal(weights, num):
    c = threshold(weights, num)
    sure = weights > c if c else weights > 0
    expected = np.where(sure, 0.0, weights / c if c else 0.0)
    for counts, probability in _systematic(expected):
        yield counts + sure, probability


LAWS = {
    "multinomial": multinomial,
    "stratified": stratified,
    "systematic": systematic,
    "residual": residual,
    "killing": killing,
    "ssp": ssp,
    "optimal": optimal,
}


def assert_law(counts, expected_law, level=1e-6):
    """Chi-squared test of observed counts (draws, n) against a law; what cannot happen must not happen.

    Outcomes expected fewer than 8 times are pooled. A correct sampler fails with probability ``level``.
    """
    counts = np.asarray(counts)
    base = np.int64(counts.sum(axis=1).max() + 1) ** np.arange(counts.shape[1])
    _, first, seen = np.unique(counts @ base, return_index=True, return_counts=True)
    observed = dict(zip(map(tuple, counts[first].tolist()), seen.tolist(), strict=True))
    assert set(observed) <= set(expected_law), f"impossible: {set(observed) - set(expected_law)}"
    total = sum(observed.values())
    expected = np.array([total * p for p in expected_law.values()])
    found = np.array([observed.get(outcome, 0) for outcome in expected_law])
    rare = expected < 8
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        found = np.append(found[~rare], found[rare].sum())
    statistic = np.sum((found - expected) ** 2 / expected)
    if len(expected) > 1:
        assert statistic <= stats.chi2.isf(level, len(expected) - 1), f"{found} against {expected}"
