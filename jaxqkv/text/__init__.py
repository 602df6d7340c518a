"""Text files, tokenizers, batches of token ids, and corpora."""
