"""Running a model: `Model`, forward passes, sweeps, and the streaming of weights."""
