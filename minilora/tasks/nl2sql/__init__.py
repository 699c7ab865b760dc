"""The built-in task, English questions to SQL: a grammar, and its words as data files."""
