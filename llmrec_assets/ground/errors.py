"""The errors a user of the graph can cause and mend.

Every message names the thing, the place and the way out. Programming errors do not belong
here: those are ordinary ``ValueError``/``TypeError``.
"""

from __future__ import annotations


class LlmrecError(Exception):
    """Base of every error whose message is written for the person running the graph."""


class DataError(LlmrecError):
    """Input data cannot be used: names the file, the row where there is one, and the remedy."""


class RecipeError(LlmrecError):
    """A recipe file is missing or holds a value that cannot be used."""


class StoreError(LlmrecError):
    """Something published is missing, incomplete or does not match its manifest."""


class ModelError(LlmrecError):
    """A model cannot be obtained or loaded."""
