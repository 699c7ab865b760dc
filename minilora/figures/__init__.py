"""Figures on paper: tables, plots, and the machine on which the figures were measured."""
