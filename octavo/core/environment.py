"""Environment variables by which the launcher talks to the training processes that it starts."""

STORE_VARIABLE = "OCTAVO_STORE"
"""The file through which the processes of one machine find each other."""
STATUS_VARIABLE = "OCTAVO_STATUS"
"""The folder of the processes' status files; without it none is written."""
LAUNCHER_VARIABLE = "OCTAVO_LAUNCHER"
"""The launcher's process id: it starts the training processes, and they end when it is gone."""
