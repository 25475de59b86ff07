"""Lossless speculation: a draft writes tokens, one pass of the model itself over all of them accepts those it agrees with.

`accept.py`: which tokens are accepted, pure maths. `lookup.py`: drafts of the context's own n-grams. `drafts.py`: where
tokens are drafted. `pace.py`: how many. `loop.py`: rounds of drafting and verifying. `copies.py`: a quantised copy that
drafts. `speculator.py`: all of it, for one model. `kinds.py`: what `--speculate` may say.
"""
