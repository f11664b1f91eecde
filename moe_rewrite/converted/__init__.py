"""The converted model: graphs, blocks, parameters, the set of experts, saving and the report."""
