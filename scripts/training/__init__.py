"""The training of the two bundled checkpoints, run by `scripts/train_demo.py`."""
