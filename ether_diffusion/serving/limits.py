"""How much the engine takes on where nobody says otherwise."""

MAX_LINE = 64
"""Images that may wait."""
HOST_BYTES = 2**31
"""Of main memory, for adapters."""
