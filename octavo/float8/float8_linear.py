"""`Float8Linear` under the import path that users of torchao know."""

from octavo.float8.linear import Float8Linear

__all__ = ["Float8Linear"]
