"""User-item graph, its partitions, and the exchange of rows between their owners."""
