"""Forecast of how many more tasks every layer has room for, from the growth of its protected subspace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_keeplora.methods import Layer
from llava_keeplora.run_folder import Capacity
from llava_keeplora.subspace import Room, room_left


def forecast(
    stages: Sequence[Mapping[str, Mapping[str, Any]]], layers: Mapping[str, Layer]
) -> dict[str, Room]:
    """Return layer → its remaining room.

    It depends on the tasks learned so far alone, not on how many are to come, so that a run can be extended.

    Args:
        stages: the capacity records of the base and of each task so far: layer → its entry under `capacity`.
        layers: the adapted layers.
    """
    capacities = {name: [Capacity.from_dict(stage[name]) for stage in stages] for name in stages[-1]}
    return {
        name: room_left(history[-1].width, [after.protected for after in history], layers[name].rank)
        for name, history in capacities.items()
    }


def shortage(rooms: Mapping[str, Room], layers: Mapping[str, Layer], to_come: int) -> str | None:
    """Return a warning if layers lack room for the tasks to come at full rank; None if all have enough."""
    short = sorted(
        (room.tasks, name) for name, room in rooms.items() if room.tasks is not None and room.tasks < to_come
    )
    if not short:
        return None
    tasks, name = short[0]
    layer, first = layers[name], rooms[name]
    width = layer.module.in_features
    return (
        f"{to_come} more task{'s' * (to_come > 1)} to come, and {len(short)} of {len(rooms)} layers have no "
        "room for as many at full rank; "
        f"the first to fill up is {name}: {first.left} of {width} directions are left, {first.growth:.1f} "
        f"fewer after each task, room for {tasks} at rank {layer.rank}; "
        f"a run with a lower parts.{layer.part}.energy_feature or parts.{layer.part}.rank has more room"
    )
