"""The uses of finished adapters: merging, combining, and batches whose rows use different adapters."""
