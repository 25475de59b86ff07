"""Weights of 8 or 4 bits: how they are chosen, and putting them into a model."""

from teal_cli.quantise.model import pack_, quantise_
from teal_cli.quantise.scheme import Scheme
from teal_cli.quantise.values import quantise

__all__ = ["Scheme", "pack_", "quantise", "quantise_"]
