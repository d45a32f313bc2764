"""Convergence diagnostics one draw at a time, as Vehtari et al. (2021) and the Stan manual write them."""

import numpy as np
import scipy.stats


def split(x):
    half = x.shape[1] // 2
    return np.concatenate([x[:, :half], x[:, -half:]])


def normal_scores(x):
    ranks = scipy.stats.rankdata(x, method="average").reshape(x.shape)
    return scipy.stats.norm.ppf((ranks - 3 / 8) / (x.size + 1 / 4))


def plain_rhat(x):
    n = x.shape[1]
    between, within = n * np.var(x.mean(axis=1), ddof=1), np.mean(np.var(x, axis=1, ddof=1))
    return np.sqrt((between / within + n - 1) / n)


def rhat(x):
    x = split(x)
    return max(plain_rhat(normal_scores(x)), plain_rhat(normal_scores(np.abs(x - np.median(x)))))


def plain_ess(x):
    m, n = x.shape
    centered = x - x.mean(axis=1, keepdims=True)
    autocovariance = [np.mean(np.sum(centered[:, : n - t] * centered[:, t:], axis=1)) / n for t in range(n)]
    within = autocovariance[0] * n / (n - 1)
    total = autocovariance[0] + (np.var(x.mean(axis=1), ddof=1) if m > 1 else 0)
    rho = [1.0] + [1 - (within - a) / total for a in autocovariance[1:]]
    smallest, tau, t = np.inf, -1.0, 0
    while t + 3 < n - 1 and rho[t] + rho[t + 1] > 0:  # Geyer: positive, then monotone
        smallest = min(smallest, rho[t] + rho[t + 1])
        tau, t = tau + 2 * smallest, t + 2
    tau += max(rho[t], 0)
    return m * n / max(tau, 1 / np.log10(m * n))


def bulk(x):
    return plain_ess(normal_scores(split(x)))


def quantile(x, p):
    return plain_ess(split((x <= np.quantile(x, p)).astype(float)))


def tail(x):
    return min(quantile(x, 0.05), quantile(x, 0.95))


def mcse_mean(x):
    return x.std(ddof=1) / np.sqrt(plain_ess(split(x)))


def mcse_sd(x):
    squares = (x - x.mean()) ** 2
    variance = (np.mean(squares**2) - np.mean(squares) ** 2) / plain_ess(split(squares))
    return np.sqrt(variance / np.mean(squares) / 4)


def mcse_quantile(x, p):
    size = quantile(x, p)
    low, high = scipy.stats.beta.ppf([0.1586553, 0.8413447], size * p + 1, size * (1 - p) + 1) * x.size - 1
    ordered = np.sort(x.ravel())
    return (ordered[min(int(np.ceil(high)), x.size - 1)] - ordered[max(int(np.floor(low)), 0)]) / 2


def nested(x, num_superchains):
    """Margossian et al. (2024), definition 2.1, term by term."""

    def plain(x):
        superchains = x.reshape(num_superchains, -1, x.shape[1])
        means, within = [], []
        for chains in superchains:
            chain_means = [chain.mean() for chain in chains]
            means.append(np.mean(chain_means))
            between_chains = np.var(chain_means, ddof=1) if len(chains) > 1 else 0
            within_chains = np.mean([np.var(c, ddof=1) for c in chains]) if x.shape[1] > 1 else 0
            within.append(between_chains + within_chains)
        return np.sqrt(1 + np.var(means, ddof=1) / np.mean(within))

    return max(plain(normal_scores(x)), plain(normal_scores(np.abs(x - np.median(x)))))
