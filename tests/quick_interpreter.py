"""Triton's interpreter without what it repeats. Import it when TRITON_INTERPRET is set."""

import dataclasses
from types import SimpleNamespace

from triton import language
from triton.runtime import interpreter


def quicken() -> None:
    """Leave out what Triton's interpreter repeats: more than half of the time of our kernels.

    It patches the whole language again for every launch and whenever one kernel function calls
    another, and follows every whole-number sum in 64 bits to see whether it overflows.
    """
    names = {"tl": language, "core": language.core}  # as our kernels and triton's own functions import them
    patched = interpreter._patch_lang(SimpleNamespace(__globals__=names))
    interpreter._patch_lang = lambda _: type(patched)()  # with nothing to take back
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
