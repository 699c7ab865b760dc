"""`python -m minilora.pretrain`: the making of the shipped model."""
