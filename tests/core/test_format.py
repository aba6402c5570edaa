"""Formatting of numbers in messages."""

from octavo.core.format import format_bytes


def test_format_bytes():
    assert [format_bytes(n) for n in (0, 1023, 1024, 3 * 2**20, 5 * 2**40)] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "3.0 MiB",
        "5.0 TiB",
    ]
