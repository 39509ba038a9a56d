"""Models and files as data: which there are, what they default to, where they lie, and how they come here.

Owns the catalog tables, the folders and the downloads; knows nothing of tensors, plans or devices. The package itself
imports only what is light: `verify` opens checkpoints, and so loads torch; `installed` does where it has to.
"""

from kinema.catalog.table import find_entry, load_catalog, matching_entries

__all__ = ["find_entry", "load_catalog", "matching_entries"]
