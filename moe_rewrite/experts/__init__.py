"""Kinds of experts: their parameters, the calls that run at their sites, and file formats."""
