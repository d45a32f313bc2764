"""Language models: what one is, a table whose answers are known exactly, transformers, and their checkpoints.

Start with ``base`` (the contract) and ``model`` (network, tokenizer and reward model together); ``folder`` loads one.
"""
