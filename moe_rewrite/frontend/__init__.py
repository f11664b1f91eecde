"""From a module to a captured program; everything that depends on transformers."""
