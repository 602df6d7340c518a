"""Running a model: forward passes, streaming of weights, `Model`."""
