"""Many requests one after another: prompt files, their manifest, and the run that a failed line does not stop.

Owns the syntax of prompt lines and the record of what is done; prints nothing and reads no environment.
"""
