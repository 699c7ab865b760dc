"""One run on disk: its settings, its data, its folder, and how it is judged."""
