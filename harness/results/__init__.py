"""Read and write results: rows, tables, figures, Markdown, LaTeX, and terminal output."""
