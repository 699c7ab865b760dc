"""`python -m minilora.plan`: the memory and the arithmetic of a training run, before it begins."""
