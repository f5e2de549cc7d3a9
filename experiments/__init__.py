"""Experiments: `python -m experiments` lists them, `python -m experiments NAME --flag value` runs one.

An experiment is a module of this folder with a frozen dataclass `Config`, whose fields are the flags (`workers`,
`seeds` and `output` among them), and

* `run(config)`, which yields records (dictionaries that JSON can hold) while it works,
* `table(records)`, which returns a rich table of them,
* `plot(records, folder)`, which draws figures from them and from nothing else.

It is found by looking at the folder: there is no list to add it to. The other modules are what experiments share.
"""
