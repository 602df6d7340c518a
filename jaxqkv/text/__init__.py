"""Text: reading it, tokenizers, batches of token ids, and the documents of corpora."""
