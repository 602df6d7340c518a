"""Text as the commands read it: text files, and the documents of .txt, .jsonl and .parquet files."""
