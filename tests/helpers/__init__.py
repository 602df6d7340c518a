"""Oracles, checkpoints and stand-ins that several tests share."""
