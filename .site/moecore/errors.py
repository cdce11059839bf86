"""Exceptions of the Python layer; those of the core are in `moecore._core`."""


class FormatError(ValueError):
    """A file of a checkpoint is cut, contradicts itself, or does not fit the model."""
