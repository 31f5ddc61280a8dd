"""Whether an error says that memory ran out."""

# As torch and TorchScript say it, on a GPU and on a CPU; the latter two raise plain RuntimeErrors.
SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "status_alloc_failed")


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of this machine or of a device."""
    # By name: torch, whose error this is, is not to be imported for what runs without it.
    names = {kind.__name__ for kind in type(error).__mro__}
    text = str(error).lower()
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or any(it in text for it in SIGNS)
