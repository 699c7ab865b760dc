"""One file a method: what trains at the start, where it enters the model, its settings, and its name in files.

Start with `lora.py`. What every file says is listed in `method.py`.
"""
