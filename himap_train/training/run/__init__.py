"""A run around its training: command line, folder, processes, rehearsal, feature cache, measured rows."""
