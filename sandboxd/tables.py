"""Imports every slice's tables, so that metadata and migrations are complete."""

from sandboxd.identity import models as identity_models
from sandboxd.kit.db import Table
from sandboxd.sandboxes import models as sandboxes_models

TABLES = (identity_models, sandboxes_models)

metadata = Table.metadata
