"""Programs that generate and measure: each module is one verb of the `jaxspec` command."""
