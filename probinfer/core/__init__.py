"""The words that every other package uses; nothing here knows an algorithm or a model.

``types`` has array types and the pytree decorator, ``algorithm`` the pair of functions that a loop runs and the status
codes, ``errors`` messages that say what to do, ``binding`` functions with their data, and ``identity`` what a function
depends on. Start with ``algorithm``.
"""
