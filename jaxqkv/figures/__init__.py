"""Figures: a registry of what can be drawn, displays, `Figure`s that are drawn, and a gallery that keeps them."""

from jaxqkv.figures.drawing import Figure

__all__ = ["Figure"]
