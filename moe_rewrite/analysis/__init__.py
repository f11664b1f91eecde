"""What a captured graph is made of: its mainline, its blocks, their costs. Reads, never edits."""
