"""What a model is on disk: finding it, describing it, reading its tensors. No torch in here."""


class CheckpointError(Exception):
    """A model that cannot be served as it lies on disk. The message names the file and what is wrong with it."""
