"""The process that owns the others, and never sees a request."""


class StartError(Exception):
    """The server cannot start, or cannot go on. The text says why, in words for the operator."""

    def __init__(self, text: str, exit_code: int = 1) -> None:
        super().__init__(text)
        self.exit_code = exit_code
