"""For how many more tasks every layer has room, from how its protected subspace grew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_keeplora.methods import Layer
from llava_keeplora.run_folder import Capacity
from llava_keeplora.subspace import Room, room_left


def forecast(
    stages: Sequence[Mapping[str, Mapping[str, Any]]], layers: Mapping[str, Layer]
) -> dict[str, Room]:
    """Layer → its room; it depends on the tasks so far alone, so that a run may be extended.

    Args:
        stages: the base's capacity, then that after each task: layer → what a record holds of it.
        layers: the adapted layers.
    """
    sizes = {name: [Capacity.from_dict(stage[name]) for stage in stages] for name in stages[-1]}
    return {
        name: room_left(of[-1].width, [size.protected for size in of], layers[name].rank)
        for name, of in sizes.items()
    }


def shortage(rooms: Mapping[str, Room], layers: Mapping[str, Layer], to_come: int) -> str | None:
    """What to tell where the tasks to come won't find room at full rank; None where they will."""
    short = sorted(
        (room.tasks, name) for name, room in rooms.items() if room.tasks is not None and room.tasks < to_come
    )
    if not short:
        return None
    tasks, name = short[0]
    layer, room = layers[name], rooms[name]
    width = layer.module.in_features
    return (
        f"{to_come} more task{'s' * (to_come > 1)} to come, and {len(short)} of {len(rooms)} layers have no "
        "room for as many at full rank; "
        f"the first to fill is {name}, {room.left} of {width} directions left, {room.growth:.1f} fewer a "
        f"task, room for {tasks} at rank {layer.rank}; "
        f"with a lower parts.{layer.part}.energy_feature or parts.{layer.part}.rank another run has more"
    )
