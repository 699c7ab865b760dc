"""Words in, numbers out: tokenizer, data sets, batches; and the texts that the shipped model learns from."""
