"""What `python -m minilora.compare` does, a file each: who competes, running them, and what is told of the outcome.

`rivals` names the methods with the flags and learning rates that each is tried with; `trials` runs `minilora.train` for
each and finds the best rate; `inputs` writes the data that all share. Of what the trials leave, `figures` makes numbers,
`latency` times answers, `spectrum` looks at the changes of the weights, and `report`, `claims` and `plots` tell it.
"""
