"""What a slide may be called: its id names folders, on Linux, macOS and Windows alike."""

import re
import unicodedata

LONGEST = 120  # bytes; file systems take 255 for a name, and suffixes are added
FORBIDDEN = '<>:"/\\|?*'
UNSEEN = {"Cc", "Cs", "Zl", "Zp"}  # control characters, halves of characters, line ends
DEVICES = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)  # of Windows
# What stages write beside the slides' folders.
TAKEN = re.compile(r"slides|.*\.(csv|json|dvc)", re.IGNORECASE | re.DOTALL)


def normal(name: str) -> str:
    """One form for names that look alike: macOS takes an accent off its letter, others do not."""
    return unicodedata.normalize("NFC", name)


def fault(name: str) -> str:
    """Why the name cannot be a folder of each stage; empty where it can."""
    wrong = [c for c in name if c in FORBIDDEN or unicodedata.category(c) in UNSEEN]
    if wrong:
        return f"it has {wrong[0]!r} in it"
    if not name or name[0] in ".-" or name[0].isspace():
        return "it is empty, or begins with a dot, dash or blank"
    if name[-1] == "." or name[-1].isspace():
        return "it ends with a dot or blank"
    if len(name.encode()) > LONGEST:
        return f"it is longer than {LONGEST} bytes in UTF-8"
    if DEVICES.fullmatch(name) or TAKEN.fullmatch(name):
        return "Windows, or a file of a stage, has this name"
    return ""
