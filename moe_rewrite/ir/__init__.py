"""The words: programs, sites, steps, depth maps, layouts of gates, patches."""
