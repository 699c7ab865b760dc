"""The transformer, written once for frozen weights. It knows nothing of LoRA or of any other method."""
