"""The library's own errors: one base, so that a caller can catch what throughtime refuses and nothing else."""


class ThroughtimeError(ValueError):
    """Base of every error that the library raises on purpose; its text names the cause, the place and the way out."""


class CellError(ThroughtimeError):
    """A cell says something that its equations cannot express, or its data is not a cell."""


class ShapeError(ThroughtimeError):
    """A tensor, a length or a mask does not fit the layer it was given to."""


class DataError(ThroughtimeError):
    """A file or a table cannot be read as sequences."""


class TargetError(ThroughtimeError):
    """A target of the engine is unknown, or cannot run what it was asked to run."""


class InternalError(ThroughtimeError):
    """The library is about to do something that could only go wrong: a mistake of ours, not of the caller's."""


class InteropError(ThroughtimeError):
    """Another library's file or model cannot be read or made, or does not compute what ours does."""
