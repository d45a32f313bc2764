"""Language models: the contract, a table whose answers are known exactly, transformers, and their checkpoints.

Start with ``base`` (the contract) and ``model`` (network, tokenizer and reward model together); ``folder`` loads a
model.
"""
