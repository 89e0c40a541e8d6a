"""Inference API: a small HTTP service in front of a Python model."""

__version__ = "1.0.0"
