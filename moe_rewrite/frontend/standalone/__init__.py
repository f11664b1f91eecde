"""Folders that transformers reads with a modelling file of their own, without this package."""
