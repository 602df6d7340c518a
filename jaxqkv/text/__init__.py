"""From texts to tokens: tokenizers built from a checkpoint's files."""
