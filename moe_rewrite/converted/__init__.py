"""The converted model: its graphs, blocks, parameters, experts that come and go, saving and the report."""
