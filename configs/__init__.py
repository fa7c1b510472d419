"""Experiments, one module each: `jaxspec train NAME` reads the module of that name, `jaxspec configs` lists them."""
