"""What a training step takes, counted: bytes, FLOPs and calls."""
