"""Experts that run convolutional regions on patches."""
