"""Numerical work that knows no algorithm: factorizations, quadrature, optimization, weights and sums over pairs.

Start with ``weights`` (log weights of samples) or ``linalg`` (Cholesky factors that report). ``stein`` applies the
Stein operator of a density to a kernel, and ``lbfgs`` minimizes without a step size.
"""
