"""Errors of the subspace mathematics, each with a message of one sentence.

They are `ValueError`s without dependencies, so that `subspace/` is usable with torch alone; the driver adds
the layer's name and the cure.
"""


class SubspaceError(ValueError):
    """Base class of the errors below; callers catch it to add the layer's name."""


class EnergyError(SubspaceError):
    """Error for an energy outside (0, 1], or a total that is not a finite non-negative number."""


class ShapeError(SubspaceError):
    """Error for tensors that don't belong to the same layer, or a tensor of a wrong shape."""


class NonFiniteError(SubspaceError):
    """Error for an input with NaN or infinity, which has no meaningful singular values."""


class RankError(SubspaceError):
    """Error for a request of more directions than exist.

    Args:
        message: the sentence for the user.
        requested: number of requested directions.
        available: number of existing directions; a caller may retry with this rank.
    """

    def __init__(self, message: str, *, requested: int, available: int):
        super().__init__(message)
        self.requested = requested
        self.available = available
