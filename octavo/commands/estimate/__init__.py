"""`octavo estimate`: predicts memory, messages and time of a job without running it. Read main.py first."""
