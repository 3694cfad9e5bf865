"""Comparisons over several teachers: each one command, its figures in studies/results/."""
