"""Imported by the server of a run's steps, behind ``preload``, before a run that uses models."""

from llmrec_assets import models
from llmrec_assets.ground.surroundings import import_all

import_all(models)
