"""Tasks, one a package or file: the grid, what is measured in it, and its tables."""
