"""Learned sparsity: a little training, by a recipe, that gives back what skipping costs or makes more to skip.

`recipe.py` says what a recipe gives, `recipes/` has one file for each. `loop.py` runs one: it measures, operates on the
model, trains it stage after stage (`trainer.py`, on transformers' Trainer, with the loss of `distil.py` and the text of
`data.py`), and hands over what `finish_` leaves behind. `state.py` is what a killed run resumes from.
"""
