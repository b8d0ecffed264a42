"""Tables, plots, report."""
