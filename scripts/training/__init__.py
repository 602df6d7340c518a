"""How the two bundled checkpoints are trained; run by `scripts/train_demo.py`."""
