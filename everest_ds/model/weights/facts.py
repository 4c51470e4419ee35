"""What tensors do not tell of their model, and how it travels beside them: one line of JSON.

Place in the flow: `everest convert` writes it into the files that it makes, and reads it back.
"""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from everest_ds.errors import UserError

COUNTS = ("num_heads", "decoder_num_heads", "num_frames", "image_height", "image_width")
EPSILONS = ("norm_eps", "last_norm_eps")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What tensors do not tell of their model; None where nobody said.

    Attributes:
        num_heads: Attention heads of the encoder.
        decoder_num_heads: Attention heads of the decoder.
        num_frames: Frames of the clips that positions are laid out for; with height and width, or none of them.
        image_height: Height of those clips in pixels.
        image_width: Width of those clips in pixels.
        labels: Names of the classes, in the head's order.
        norm_eps: What the norms add to the variance.
        last_norm_eps: The same for the decoder's or the classifier's norm, which Hugging Face computes otherwise.
    """

    num_heads: int | None = None
    decoder_num_heads: int | None = None
    num_frames: int | None = None
    image_height: int | None = None
    image_width: int | None = None
    labels: tuple[str, ...] | None = None
    norm_eps: float | None = None
    last_norm_eps: float | None = None

    def dump(self) -> str:
        """Return the facts as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: object, source: str) -> "Facts":
        """Read what `dump` wrote.

        Raises:
            UserError: The text is something else.
        """
        try:
            raw: Any = json.loads(text) if isinstance(text, str) else None
            counts = {name: raw[name] for name in COUNTS}
            epsilons = {name: raw[name] for name in EPSILONS}
            labels = raw["labels"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{source}: what it says of its model is not what `everest convert` writes") from error
        for kind, numbers in ((int, counts), (float, epsilons)):
            if not all(
                value is None or (type(value) is kind and 0 < value < math.inf) for value in numbers.values()
            ):
                raise UserError(f"{source}: its model is described by {numbers}; expected positive numbers")
        names = tuple(str(label) for label in labels) if isinstance(labels, list) else None
        return cls(**counts, **epsilons, labels=names)


NO_FACTS = Facts()
