"""Labels, parameters, errors, files and the entry point of scripts."""
