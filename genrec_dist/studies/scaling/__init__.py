"""Layer-scaling studies: sweeps of runs, fits of scaling laws, and the report that weighs them."""
