"""What a job will need, found out without running it: see `octavo/estimate.py`."""
