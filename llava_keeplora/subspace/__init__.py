"""The mathematics of protected subspaces: torch and the standard library only."""

from llava_keeplora.subspace.basis import (
    append_directions,
    empty_basis,
    orthonormality_error,
    orthonormalized,
    overlap,
    project,
    residual,
)
from llava_keeplora.subspace.capacity import Room, room_left
from llava_keeplora.subspace.energy import energy_rank, guaranteed_room, least_share
from llava_keeplora.subspace.errors import EnergyError, NonFiniteError, RankError, ShapeError, SubspaceError
from llava_keeplora.subspace.feature_sketch import SketchedFeatureDirections, SketchedMoment
from llava_keeplora.subspace.features import FeatureDirections, feature_directions, leading_directions
from llava_keeplora.subspace.gradient_sketch import (
    WIDTH_PER_RANK,
    GradientSketch,
    SecondPass,
    SketchedDirections,
    sketch_width,
    sufficient_width,
)
from llava_keeplora.subspace.gradients import (
    DenseGradient,
    HeldOut,
    ResidualDirections,
    residual_gradient_directions,
)
from llava_keeplora.subspace.moments import SecondMoment
from llava_keeplora.subspace.principal import PrincipalBasis, principal_basis
from llava_keeplora.subspace.released import (
    RunningMeanFeatures,
    released_clip_extend,
    released_clip_weight_basis,
    released_llava_directions,
    released_llava_extend,
    released_llava_weight_basis,
)
from llava_keeplora.subspace.tail import SpectralTail, spectral_tail

__all__ = [
    "WIDTH_PER_RANK",
    "DenseGradient",
    "EnergyError",
    "FeatureDirections",
    "GradientSketch",
    "HeldOut",
    "NonFiniteError",
    "PrincipalBasis",
    "RankError",
    "ResidualDirections",
    "Room",
    "RunningMeanFeatures",
    "SecondMoment",
    "SecondPass",
    "ShapeError",
    "SketchedDirections",
    "SketchedFeatureDirections",
    "SketchedMoment",
    "SpectralTail",
    "SubspaceError",
    "append_directions",
    "empty_basis",
    "energy_rank",
    "feature_directions",
    "guaranteed_room",
    "leading_directions",
    "least_share",
    "orthonormality_error",
    "orthonormalized",
    "overlap",
    "principal_basis",
    "project",
    "released_clip_extend",
    "released_clip_weight_basis",
    "released_llava_directions",
    "released_llava_extend",
    "released_llava_weight_basis",
    "residual",
    "residual_gradient_directions",
    "room_left",
    "sketch_width",
    "spectral_tail",
    "sufficient_width",
]
