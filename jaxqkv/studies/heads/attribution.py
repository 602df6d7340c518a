"""A figure."""
