"""Tasks, each in its own package or file: the grid, what is measured in it, and the tables made from it."""
