"""`python -m minilora.plan`: what a training run takes, before it begins."""
