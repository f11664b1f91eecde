"""The command line: the same names as the functions."""
