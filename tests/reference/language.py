"""All texts of a tabular language model, one by one: steps, ends, rewards and evidence in plain Python."""

import numpy as np


def texts(logits, transitions, start, prompt, eos, max_tokens, temperature=1.0, top_k=None):
    """Every text that ends in an end token or has ``max_tokens`` tokens, with its log probability."""
    state = start
    for token in prompt:
        state = transitions[state][token]
    found = []

    def grow(text, state, log_prob):
        if (text and text[-1] in eos) or len(text) == max_tokens:
            found.append((tuple(text), log_prob))
            return
        row = np.asarray(logits[state], float) / temperature
        if top_k is not None:
            kept = np.argsort(-row, kind="stable")[:top_k]
            row = np.where(np.isin(np.arange(len(row)), kept), row, -np.inf)
        row = row - np.logaddexp.reduce(row)
        for token, value in enumerate(row):
            if value > -np.inf:
                grow([*text, token], transitions[state][token], log_prob + value)

    grow([], state, 0.0)
    return found


def steps(text, size, delimiter=None, spell=None):
    """Cut a text into steps: after ``size`` tokens, or the token that completes the delimiter."""
    found, now = [], []
    for token in text:
        now.append(token)
        over = len(now) == size
        if delimiter is not None:
            over |= delimiter in "".join(spell[v] for v in now)
        if over:
            found.append(tuple(now))
            now = []
    if now:
        found.append(tuple(now))
    return found


def log_reward(text, cut, score, meaning, log_step_probs=None):
    """Log weight of a whole text by the meaning of the scores r(prefix) in (0, 1)."""
    prefixes, done = [], 0
    for step in cut:
        done += len(step)
        prefixes.append(text[:done])
    r = np.array([score(prefix) for prefix in prefixes])
    if meaning == "likelihood":
        return np.sum(np.log(r))
    if meaning == "odds":
        return np.sum(np.log(r) - np.log1p(-r))
    return np.log(r[-1])


def posterior(weighted):
    """Normalized posterior and log evidence of ``{text: log weight}``."""
    values = np.array(list(weighted.values()))
    log_z = np.logaddexp.reduce(values)
    return dict(zip(weighted, np.exp(values - log_z))), log_z
