"""Built-in tasks: rows to train on that come with minilora. They import nothing but the standard library."""
