"""Videos as processors of transformers take them, made by Pillow.

The video processors of transformers exist with torchvision only. These give the same tensors for frames that
are chosen already, scaled by Pillow as images are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from llava_keeplora_eval.image_inputs import blank_image, shape_only

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

#: Of each image, its time in its video and the video's length in seconds; None where they are not known.
Times = Sequence["tuple[float, float] | None"]
#: Frames of one video, in order.
Frames = Sequence["Image.Image"]

BICUBIC, LANCZOS = 3, 1  # as Pillow numbers them
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_COMMON = {"rescale_factor": 1 / 255, "resample": BICUBIC, "cap_pixels_per_frame": None}
_PATCHES = {"temporal_patch_size": 2, "merge_size": 2}


@dataclass(frozen=True)
class VideoLayout:
    """How the processor of a type of model takes videos.

    Args:
        make: (settings, frames) → the model's inputs for one video, by key.
        defaults: settings of the type's video processor where the checkpoint's files name none.
        stacked: whether the processor wants each key as one value for each video, instead of all in one.
        replaces_images: whether the model takes videos by the keys of images, so that it takes one or the
            other.
        fills_patches: whether a video has as many frames as a patch spans at the least; where it may have
            fewer, its last frame is repeated.
    """

    make: Callable[[Mapping[str, Any], Frames], dict[str, Tensor]]
    defaults: Mapping[str, Any]
    stacked: bool = False
    replaces_images: bool = False
    fills_patches: bool = False


@dataclass
class PillowVideos:
    """A video processor that scales frames by Pillow.

    It takes all frames that it is given: a recipe has chosen them.

    Args:
        layout: how the model's processor takes videos.
        settings: of the checkpoint's video processor.
    """

    layout: VideoLayout
    settings: Mapping[str, Any]
    num_frames: None = None
    fps: None = None
    model_input_names: tuple[str, ...] = ()
    _auto_class: ClassVar[None] = None  # asked for when the processor is saved
    _by_size: dict[tuple[int, int, int], dict[str, Any]] = field(default_factory=dict)

    @property
    def merge_size(self) -> int:
        """Patches along each side that become one token."""
        return self.settings["merge_size"]

    @property
    def temporal_patch_size(self) -> int:
        """Frames that a patch spans."""
        return self.settings["temporal_patch_size"]

    @property
    def fewest_frames(self) -> int:
        """Frames that a video has at the least."""
        return self.temporal_patch_size if self.layout.fills_patches else 1

    def __call__(
        self, videos: Sequence[Frames], video_metadata: Sequence[Any] | None = None, **_: Any
    ) -> Mapping[str, Any]:
        """Return the model's inputs for some videos, by key.

        Args:
            videos: the frames of each.
            video_metadata: of each, a `VideoMetadata` of transformers; what it assumes of frames alone when
                None.
        """
        made = [self.layout.make(self.settings, frames) for frames in videos]
        return self._joined(made, video_metadata or [metadata(len(frames)) for frames in videos])

    def _joined(self, made: Sequence[Mapping[str, Any]], metadata: Sequence[Any]) -> Mapping[str, Any]:
        import torch
        from transformers import BatchFeature

        joined = torch.stack if self.layout.stacked else torch.cat
        inputs: dict[str, Any] = {key: joined([item[key] for item in made]) for key in made[0]}
        return BatchFeature(inputs | {"video_metadata": list(metadata)})


class VideoShapes(PillowVideos):
    """A video processor that makes what the sizes of frames alone decide, once for each size."""

    @classmethod
    def of(cls, videos: PillowVideos) -> VideoShapes:
        """Return one with the settings of another."""
        return cls(videos.layout, videos.settings)

    def __call__(
        self, videos: Sequence[Any], video_metadata: Sequence[Any] | None = None, **_: Any
    ) -> Mapping[str, Any]:
        """Return a video processor's outputs with floating-point values left out, but for their shapes.

        Args:
            videos: (frames, height, width, 3) each, of which the shapes alone are read.
            video_metadata: see `PillowVideos`.
        """
        made = [self._shapes(*video.shape[:3]) for video in videos]
        return self._joined(made, video_metadata or [metadata(len(video)) for video in videos])

    def _shapes(self, count: int, height: int, width: int) -> dict[str, Any]:
        key = (count, height, width)
        if key not in self._by_size:
            made = self.layout.make(self.settings, [blank_image(height, width)] * count)
            self._by_size[key] = {name: shape_only(value) for name, value in made.items()}
        return self._by_size[key]


def metadata(count: int, times: Times = ()):
    """Return what is known of a video, as a `VideoMetadata` of transformers.

    Args:
        count: its frames.
        times: theirs; where one is not known, it is what transformers assumes of frames alone: that they are
            all frames of a video, 24 a second.
    """
    from transformers.video_utils import VideoMetadata

    known = [time for time in times if time is not None]
    if len(known) < count:
        return VideoMetadata(total_num_frames=count, frames_indices=list(range(count)))
    # Counted in frames of a second each, which need not be whole.
    length = known[0][1]
    seconds: Any = [time for time, _ in known]
    return VideoMetadata(total_num_frames=length, fps=1.0, duration=length, frames_indices=seconds)  # type: ignore[arg-type]


def blank_video(frames: int, height: int, width: int):
    """Return a black video (frames, height, width, 3), whose size alone matters; it takes no memory."""
    import numpy

    return numpy.broadcast_to(numpy.zeros((), numpy.uint8), (frames, height, width, 3))


def pillow_videos(model_type: str, settings: Mapping[str, Any]) -> PillowVideos | None:
    """Return the video processor of a type of model.

    Args:
        model_type: as in a configuration.
        settings: of its checkpoint's video processor.

    Returns:
        None where the type takes no videos, or its settings ask for what is not done here.
    """
    layout = LAYOUTS.get(model_type)
    if layout is None or not settings:
        return None
    chosen = _COMMON | dict(layout.defaults) | {k: v for k, v in settings.items() if v is not None}
    size = dict(chosen["size"])
    for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        size |= {new: chosen[old]} if old in chosen else {}
    usual = all(chosen.get(key, True) for key in ("do_resize", "do_rescale", "do_normalize"))
    if not usual or chosen.get("do_center_crop") or chosen["cap_pixels_per_frame"]:
        return None
    if not set(layout.defaults["size"]) <= set(size):
        return None
    return PillowVideos(layout, chosen | {"size": size})


def _scaled(settings: Mapping[str, Any], frames: Frames, height: int, width: int) -> Tensor:
    """Return frames in a size (frames, 3, height, width), normalised."""
    import numpy
    import torch

    resample = settings["resample"]
    pixels = numpy.stack([numpy.asarray(frame.resize((width, height), resample)) for frame in frames])
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() * settings["rescale_factor"]
    mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    return (values - mean) / std


def _fixed(settings: Mapping[str, Any], frames: Frames) -> dict[str, Tensor]:
    """Return frames of one size for all videos."""
    size = settings["size"]
    return {"pixel_values_videos": _scaled(settings, frames, size["height"], size["width"])}


def _longest_edge(settings: Mapping[str, Any], frames: Frames) -> dict[str, Tensor]:
    """Return frames scaled to a longest edge, then to a square; with masks that hide nothing."""
    import torch

    width, height = frames[0].size
    edge = settings["size"]["longest_edge"]
    if width >= height:
        width, height = edge, max(1, _even(int(edge * height / width)))
    else:
        width, height = max(1, _even(int(edge * width / height))), edge
    side = settings["max_image_size"]["longest_edge"]
    scaled = [frame.resize((width, height), settings["resample"]) for frame in frames]
    pixels = _scaled(settings, scaled, side, side)
    mask = torch.ones(len(frames), side, side, dtype=torch.long)
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def _even(number: int) -> int:
    return number + number % 2


def _patches(settings: Mapping[str, Any], frames: Frames, whole_video: bool = False) -> dict[str, Tensor]:
    """Return a video as patches (patches, numbers of a patch) and its grid (1, 3), in patches.

    Patches of a square that becomes one token follow each other; a patch's numbers are ordered by channel,
    frame, row and column.

    Args:
        settings: of the video processor.
        frames: the video's; the last is repeated where they do not fill a patch.
        whole_video: whether the limits of pixels are those of all frames together, as Qwen3-VL has it,
            instead of one frame's.
    """
    import torch

    patch, merge, depth = (settings[k] for k in ("patch_size", "merge_size", "temporal_patch_size"))
    width, height = frames[0].size
    count = len(frames) if whole_video else 1
    filled = round(count / depth) * depth if whole_video else 1
    height, width = _within(height, width, patch * merge, settings["size"], count, filled, whole_video)
    video = _scaled(settings, frames, height, width)
    video = torch.cat([video, video[-1:].expand(-len(video) % depth, -1, -1, -1)])
    grid = (len(video) // depth, height // patch, width // patch)
    cut = video.reshape(
        grid[0], depth, 3, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch
    )  # time, frame, channel, then (square, patch, row) and (square, patch, column)
    rows = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(math.prod(grid), -1)
    return {"pixel_values_videos": rows, "video_grid_thw": torch.tensor([grid])}


def _within(
    height: int,
    width: int,
    unit: int,
    size: Mapping[str, int],
    count: int,
    filled: int,
    enlarge: bool,
) -> tuple[int, int]:
    """Return the nearest sides that are multiples of a unit, with the number of pixels within limits.

    Args:
        height, width: of a frame.
        unit: of the sides.
        size: `shortest_edge` and `longest_edge`, the least and the most pixels.
        count: frames that share the limits.
        filled: these, rounded to whole patches.
        enlarge: whether a side below the unit is first enlarged to it.

    Raises:
        ValueError: a side is over 200 times the other.
    """
    if enlarge and min(height, width) < unit:
        scale = max(unit / height, unit / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > 200 * min(height, width):
        raise ValueError("a side of the video's frames is over 200 times the other")
    sides = [round(side / unit) * unit for side in (height, width)]
    pixels, least, most = filled * math.prod(sides), size["shortest_edge"], size["longest_edge"]
    if pixels > most:
        ratio = math.sqrt(count * height * width / most)
        sides = [max(unit, math.floor(side / ratio / unit) * unit) for side in (height, width)]
    elif pixels < least:
        ratio = math.sqrt(least / (count * height * width))
        sides = [math.ceil(side * ratio / unit) * unit for side in (height, width)]
    return sides[0], sides[1]


def _patches_of_video(settings: Mapping[str, Any], frames: Frames) -> dict[str, Tensor]:
    return _patches(settings, frames, whole_video=True)


_SQUARE = {"size": {"height": 384, "width": 384}, **_CLIP}
_QWEN2 = VideoLayout(
    _patches,
    {
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28},
        "patch_size": 14,
        **_PATCHES,
        **_CLIP,
    },
)

#: Model type → how its processor takes videos. Defaults are those of the video processors of transformers.
LAYOUTS: Mapping[str, VideoLayout] = {
    "qwen2_vl": _QWEN2,
    "qwen2_5_vl": _QWEN2,
    "qwen3_vl": VideoLayout(
        _patches_of_video,
        {
            "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32},
            "patch_size": 16,
            **_PATCHES,
            **_HALF,
        },
        fills_patches=True,
    ),
    "llava_onevision": VideoLayout(_fixed, _SQUARE, stacked=True),
    "internvl": VideoLayout(_fixed, _SQUARE, stacked=True),
    "smolvlm": VideoLayout(
        _longest_edge,
        {
            "size": {"longest_edge": 4 * 364},
            "max_image_size": {"longest_edge": 364},
            **_HALF,
            "resample": LANCZOS,
        },
        stacked=True,
        replaces_images=True,
    ),
}
