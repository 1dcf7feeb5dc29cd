"""Experiments on Batch Normalization, one question a folder: ``python -m experiments.NAME``.

A question's ``__main__.py`` states the claim and holds the command line. Code that several
questions share is in ``common``, ``images`` and ``nets``, which do not depend on any question.
"""
