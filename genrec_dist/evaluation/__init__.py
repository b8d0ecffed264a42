"""Full-ranking metrics, protocol, exact check."""
