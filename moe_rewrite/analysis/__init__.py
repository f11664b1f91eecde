"""Analyses of a captured graph: mainline, blocks, costs, sites. They read and do not edit."""
