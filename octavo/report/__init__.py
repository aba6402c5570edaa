"""From run folders to a report: what the runs wrote (`load.py`), what follows from it (`judge.py`, on the
statistics of `noise.py`), and the pages that show it (`page.py`, `markdown.py`, drawings by `svg.py`).

Everything that a page says is in one dictionary of plain values, the figures, which is also written as
report.json; so the pages cannot differ from each other, and a figure can be traced to the runs' metrics.
"""
