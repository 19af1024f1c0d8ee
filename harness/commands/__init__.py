"""The verbs of the command line, one per file: its arguments (`add_arguments`) and its action (`main`)."""
