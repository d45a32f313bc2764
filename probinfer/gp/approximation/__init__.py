"""The latent process given data and hyperparameters: exact, by Laplace, EP, variational inference or their hybrid.

Start with ``conditioning`` (``condition``), then ``updates`` and ``objectives``, in which the methods differ.
``iterative``, ``laplace`` and ``conjugate`` are the methods, ``conditioned`` is their result.
"""
