"""What people look at: figures beside the tables, and the report.

The report is one folder, `runs/<suite>/report/`: `index.html`, `figures/`, `images/`, `data/`. A browser opens it from
disk or from any server; it loads nothing from elsewhere, is read without JavaScript (which adds sorting and filters),
light or dark as the reader's system is, on a phone and on paper. It is made from a run folder and the store beside it
alone, so that a run can be looked at where its suite, plugins and models are not:

    run_folder.py   the rows, the suite as it was resolved, which trials a sheet shows
    records.py      the records of all stages behind the rows: provenance, time, memory
    views.py        rows -> the content of each section
    drawings.py     recovery curves and the immunity-retention plane, as SVG
    sheets.py       uncurated images, side by side
    page.py         the parts put together through `template/`

Names in a run are untrusted text: jinja2 escapes everything, and no file is named after one.
"""
