"""Numbers to files and back: rows, tables, figures, Markdown, LaTeX, the terminal."""
