"""Fuzzing: arbitrary bytes for every decoder and state machine, with and without coverage guidance.

`cli` is the command behind `tests/fuzz/run`; `targets` lists what is fuzzed; `engine` runs a target over mutations
of its corpus, `guided` does the same with atheris; `capture` records the corpus from real exchanges.
"""
