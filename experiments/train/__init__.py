"""The network, its training, evaluation and checkpoints."""
