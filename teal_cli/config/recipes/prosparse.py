"""Options of recipe prosparse."""

from typing import Literal

from pydantic import Field

from teal_cli.config.recipes import L1Options


class Options(L1Options):
    """What prosparse has of its own."""

    live_dropped: float = Field(
        0.1, ge=0, lt=1, description="share of live gates that FATReLU drops at the end, layer by layer; 0: ReLU stays"
    )
    fatrelu: Literal["end", "grown"] = Field(
        "end", description="when it comes: after training, or from the beginning with a share that grows"
    )
