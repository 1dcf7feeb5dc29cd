"""Questions about Batch Normalization, one folder each: ``python -m experiments.NAME``.

A question's ``__main__.py`` says what is claimed, and holds its command line only. What several
questions share is in ``common``, ``images`` and ``nets``, which know of no question.
"""
