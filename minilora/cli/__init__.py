"""The command line: flags, other tools' names for them, config files, and how mistakes are reported."""
