"""What is done with finished adapters: merging, combining, and batches whose rows use different ones."""
