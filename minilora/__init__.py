"""LoRA from scratch: NumPy or CuPy, no autograd, every gradient derived by hand. Start with `minilora/lora.py`."""
