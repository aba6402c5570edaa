"""Starts the training processes of a machine and watches them, without torch. Read launcher.py first."""
