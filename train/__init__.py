"""Programs that train: each module is one verb of the `jaxspec` command."""
