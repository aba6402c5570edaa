"""`octavo compare`: trains one job in several recipes and reports which of them keep the loss.

main.py is the command, runs.py says which runs a comparison needs, executor.py starts and resumes them, and
report/ turns their metrics into pages.
"""
