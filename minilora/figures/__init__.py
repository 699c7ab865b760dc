"""How figures are shown: tables, plots, and the machine on which they were measured."""
