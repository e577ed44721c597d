"""Benchmarks, run by hand: ``make bench``, and the READMEs below."""
