"""What `python -m signopt` runs. Each tool is a module with `arguments`, `measure` and `report`."""
