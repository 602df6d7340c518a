"""Devices, processes, files, interruptions and the console."""
