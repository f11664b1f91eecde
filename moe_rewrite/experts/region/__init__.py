"""Convolutional regions that experts run on patches."""
