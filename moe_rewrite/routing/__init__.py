"""Routers at the cut, and the routing plan that they make."""
