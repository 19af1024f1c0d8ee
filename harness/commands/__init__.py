"""The verbs of the command line, one a file: what it takes (`add_arguments`) and what it does (`main`)."""
