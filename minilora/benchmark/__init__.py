"""The parts of `python -m minilora.benchmark`.

`workloads` says what is measured, `measure` measures it, `report` and `plots` show it. The measured sides are programs
of their own, each in its own process, which wait for commands (`worker`): `ours`, `peft_side` (the only file of
minilora that imports PyTorch) and `products`, the matrix products alone. `formula` says how much work and memory there
has to be.
"""
