"""The parts of `python -m minilora.benchmark`.

`workloads` lists the cases, `measure` measures them, `report` and `plots` show the results. Each measured side is a
program in a process of its own that waits for commands (`worker`): `ours`, `peft_side` (the only file of minilora that
imports PyTorch) and `products`, the matrix products alone. `formula` counts the least work and memory a job can take.
"""
