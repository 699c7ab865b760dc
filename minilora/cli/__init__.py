"""The command line: flags, other tools' names for them, config files, and how mistakes are reported.

`parser.py` reads a command line, `train_flags.py` makes a flag of every declared setting, `flags.py` knows the names
and units of other tools, `foreign.py` their keys that are no settings here.
"""
