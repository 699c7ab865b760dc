"""Optimisers, schedules, the training loop, its resumable state, metrics and plots."""
