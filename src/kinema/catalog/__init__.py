"""Models as data: which there are, what they default to, and where their files lie.

Owns the catalog tables and the search for installed files; knows nothing of tensors, plans or devices.
"""

from kinema.catalog.installed import find_files
from kinema.catalog.table import find_entry, load_catalog, matching_entries

__all__ = ["find_entry", "find_files", "load_catalog", "matching_entries"]
