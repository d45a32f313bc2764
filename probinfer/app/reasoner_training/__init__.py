"""Training of the bundled reasoner and of its process reward model.

Start with ``language_model``, then ``reward_model``; ``optimizer`` is the interruptible training loop of both.
"""
