"""The report of a run, with figures, tables and images.

The report is one folder, `runs/<suite>/report/`: `index.html`, `figures/`, `images/`, `data/`. A browser opens it from
disk or from any server. It loads nothing from other sites, works without JavaScript (which adds sorting and filters),
in light and dark mode, on a phone and on paper. It is made only from a run folder and the store next to it, so it does
not need the run's suite, plug-ins or models:

    run_folder.py   the rows, the resolved suite, the trials to show on sheets
    records.py      the records of all stages behind the rows: provenance, time, memory
    views.py        rows -> content of each section
    drawings.py     recovery curves and the immunity-retention plane, as SVG
    sheets.py       uncurated images, side by side
    page.py         the page, made from these parts by `template/`

Names in a run are untrusted text: everything is escaped by jinja2, and no file is named after them.
"""
