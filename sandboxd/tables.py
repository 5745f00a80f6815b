"""Imports every slice's tables, so that metadata and migrations are complete."""

from sandboxd.identity import models as identity_models
from sandboxd.kit.db import Table

TABLES = (identity_models,)

metadata = Table.metadata
