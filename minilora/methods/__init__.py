"""One file per way of fine-tuning. Each takes a Model and gives back one with other sites, and what there trains."""
