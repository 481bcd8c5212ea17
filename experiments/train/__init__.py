"""The network, its training, its evaluation and its checkpoints."""
