"""Whether a job can run, checked before torch is imported and before any process is started.

`check` says whether a job can run here and raises `ConfigError` with a problem for each thing that is in the
way; `pipeline_plan.py` divides a model into pipeline stages, by the same rules as the checks.
"""

from octavo.preflight.checks import check, each, notes

__all__ = ["check", "each", "notes"]
