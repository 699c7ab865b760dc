"""Commands that make rows to train on from what is installed: WordNet's definitions, and Python's docstrings."""
