"""From run folders to a report.

    run_data.py     reads what the runs wrote
    figures.py      derives every figure, using the statistics of noise.py
    pages.py        the two pages; drawings.py makes their charts

Everything that a page shows comes from one dictionary of plain values, the figures, which is also written as
report.json. The pages therefore cannot contradict each other, and every figure can be traced to the runs'
metrics.
"""
