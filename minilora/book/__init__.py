"""`python -m minilora.book`: docs/ as a site, with each equation beside the function that computes it."""
