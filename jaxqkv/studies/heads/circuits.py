"""Figures of the heads' weights."""
