"""Tasks, one a package or file: which grid is walked, what is measured in it, which tables are made of it."""
