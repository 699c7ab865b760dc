"""The parts of `python -m minilora.compare`, a file each: the rivals, their trials, and the tables of the outcome.

`rivals` names the methods with the flags and learning rates that each is tried with; `inputs` writes the data that all
share; `trials` runs `minilora.train` for each and finds the best rate. Of what the trials leave, `figures` makes
numbers, `latency` times answers, and `spectrum` looks at the changes of the weights. `report`, `claims` (with `scale`,
which counts what does not fit here) and `plots` tell it.
"""
