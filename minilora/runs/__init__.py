"""One run on disk: its settings, its data, its folder and its evaluation."""
