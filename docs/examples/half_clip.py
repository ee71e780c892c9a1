"""A family of one's own: CLIP of which only the upper half of each encoder is adapted."""

import re

from llava_keeplora.models import ClipFamily


class HalfClip(ClipFamily):
    """CLIP whose lower layers stay as they are, whatever a configuration names."""

    def linear_layers(self, part, targets):
        found = super().linear_layers(part, targets)
        number = {name: int(re.search(r"\.layers\.(\d+)\.", name).group(1)) for name in found}
        middle = (max(number.values()) + 1) // 2
        return {name: layer for name, layer in found.items() if number[name] >= middle}
