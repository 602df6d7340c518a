"""Figures: a registry of what can be drawn, displays that draw it, and a gallery that keeps it."""
