"""Built-in tasks: rows to train on that come with minilora. They import the standard library and our parser alone."""
