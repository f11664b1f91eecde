"""Routers at the cut, and the plan that they make."""
