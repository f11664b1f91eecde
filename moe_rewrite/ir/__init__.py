"""Intermediate representation: programs, sites, steps, depth maps, gate layouts, patch grids."""
