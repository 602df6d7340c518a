"""GPT-2, BERT and the layers they share."""
