"""One train loop, its engines, data order and checkpoints."""
