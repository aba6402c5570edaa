"""placeholder"""

def reason(section: str, key: str) -> str | None:
    return None

def section_reason(section: str) -> str | None:
    return None
