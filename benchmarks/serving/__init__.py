"""Converted models in real engines, compared with themselves. Each takes the engine's place as an
option; what all share is in engines.py, models.py and answers.py."""
