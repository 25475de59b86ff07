"""Options of recipe lte."""

from typing import Literal, Self

from pydantic import Field, model_validator

from teal_cli.config.recipes import RecipeOptions


class Options(RecipeOptions):
    """What lte has of its own."""

    group: int = Field(4, ge=1, le=1 << 20, description="neurons that a router chooses together")
    rank: int | None = Field(
        None,
        ge=1,
        le=1 << 20,
        description="of a first layer of routers, with ReLU behind it (default: there is none)",
    )
    eta: float | None = Field(
        None,
        ge=0,
        le=1e6,
        description="weight of the loss that closes groups (default: steered so that sparsity is reached)",
    )
    shares: Literal["learned", "even"] = Field(
        "learned", description="even: steered so that each MLP leaves out the same share of its groups"
    )
    separation: float = Field(
        0.5, ge=0, le=1e6, description="weight, at its largest, of the loss that drives routers away from 1/2"
    )
    epsilon: float = Field(0.01, gt=0, le=1, description="what bounds that loss where a router says 1/2")
    bias: float = Field(3.0, ge=-100, le=100, description="of routers at the beginning: above 0 all groups are chosen")
    soft: float = Field(0.5, gt=0, lt=1, description="share of the steps in which routers train")
    router_rate: float = Field(
        10.0, gt=0, le=1e6, description="by what the learning rate of routers is above that of the model"
    )
    routers: Literal["fitted", "learned", "random"] = Field(
        "fitted",
        description="fitted: by least squares, before training and again in it, without a soft stage; learned: in a "
        "soft stage, as in the paper; random: routers that know nothing of the text, to compare with",
    )

    @model_validator(mode="after")
    def _even_shares_are_steered(self) -> Self:
        if self.shares == "even" and self.eta is not None:
            raise ValueError("even shares are steered: leave out option eta")
        return self

    @model_validator(mode="after")
    def _others_have_no_soft_stage(self) -> Self:
        of_soft_stage = ("eta", "shares", "separation", "epsilon", "bias", "soft", "router_rate")
        needless, why = {
            "learned": ((), ""),
            "fitted": ((*of_soft_stage, "rank"), "fitted routers are one linear layer, without a soft stage"),
            "random": (of_soft_stage, "random routers do not train"),
        }[self.routers]
        for key in needless:
            if key in self.model_fields_set:
                raise ValueError(f"{why}: leave out option {key}, or take routers=learned")
        return self
