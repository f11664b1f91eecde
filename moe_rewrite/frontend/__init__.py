"""From a module to a captured program; all that touches transformers."""
