"""Kinds of experts: their parameters, what runs at their sites, how they are saved."""
