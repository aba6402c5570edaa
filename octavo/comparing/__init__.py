"""The runs that a comparison is made of: which they are (`plan.py`), starting them and going on with them
(`execute.py`), and how far they are (`progress.py`).

What becomes of their metrics is `octavo.report`'s.
"""
