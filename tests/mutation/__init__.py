"""Mutants: small faults put into a module on purpose, to see whether its tests would notice them."""
