"""Lossless speculation: a draft writes tokens, and one pass of the model over all of them accepts those it agrees with.

`accept.py`: which tokens are accepted, pure maths. `lookup.py`: drafts of the text's own n-grams. `drafts.py`: where
tokens are drafted. `pace.py`: how many. `loop.py`: rounds of drafting and verifying. `speculator.py`: all of it, for
one model.
"""
