"""The recipes: a YAML file each, with its command on top. `--config NAME` finds them wherever this is installed."""
