"""Reproductions of papers: pMoE on patches, and continual learning over streams of tasks."""
