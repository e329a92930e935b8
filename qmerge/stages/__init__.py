"""The work: one verb each, on one unit of the walk."""
