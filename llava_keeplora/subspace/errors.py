"""What can go wrong in the subspace mathematics, each as one clear sentence.

These are `ValueError`s without any dependency, so that `subspace/` stays usable with torch alone; the driver
wraps them with the layer's name and the cure.
"""


class SubspaceError(ValueError):
    """Base of the errors below; catch it to name the layer in which it happened."""


class EnergyError(SubspaceError):
    """An energy outside (0, 1], or a total that is not a finite non-negative number."""


class ShapeError(SubspaceError):
    """Two tensors that don't belong to the same layer, or a tensor of the wrong rank."""


class NonFiniteError(SubspaceError):
    """An input holds NaN or infinity, so that no singular value is meaningful."""


class RankError(SubspaceError):
    """More directions were asked for than there are.

    Args:
        message: the sentence for the user.
        requested: how many directions were asked for.
        available: how many there are; a caller may retry with this rank.
    """

    def __init__(self, message: str, *, requested: int, available: int):
        super().__init__(message)
        self.requested = requested
        self.available = available
