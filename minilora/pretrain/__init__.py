"""`python -m minilora.pretrain`: how the shipped model was made."""
