"""`octavo estimate`: predicts the memory, messages and time of a job without running it. Read main.py first."""
