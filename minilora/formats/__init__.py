"""Files that other libraries read and write: Hugging Face checkpoints and PEFT adapters, as host arrays."""
