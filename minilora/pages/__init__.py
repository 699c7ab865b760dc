"""Runs as pages of HTML, each one file that needs no network and no model."""
