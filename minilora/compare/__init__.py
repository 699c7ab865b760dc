"""The parts of `python -m minilora.compare`, a file each: the rivals, their trials, and the tables of the outcome.

`rivals` names the methods, each with its flags and learning rates. `inputs` writes the data that all share. `trials`
runs `minilora.train` for each and finds the best rate. From the runs, `figures` takes the numbers, `latency` times
answers, and `spectrum` examines the changes of the weights. `report`, `claims` and `plots` present the results, and
`scale` counts the figures of models that are too large to run.
"""
