"""Experiments: `python -m experiments` lists them, `python -m experiments NAME --flag value` runs one.

Three rooms hold them: `training`, `papers` and `speed`; `common` holds what they share. An experiment is a module, or a
folder, with a frozen dataclass `Config`, whose fields are the flags (`workers`, `seeds` and `output` among them), and

* `run(config)`, which yields records (dictionaries that JSON can hold) while it works,
* `table(records)`, which returns a rich table of them,
* `plot(records, folder)`, which draws figures from them and from nothing else.

It is found by looking at the folders: there is no list to add it to.
"""
