"""The graphs of a converted model: which serves a call, and how it runs."""
