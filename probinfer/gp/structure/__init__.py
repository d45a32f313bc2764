"""The covariance matrix of the latent values, and how it is factorized.

Start with ``dense`` (a process times Gaussian sites); ``exact_evidence`` is the evidence of Gaussian noise and its
gradient; ``rounding`` bounds what the arithmetic can resolve.
"""
