"""Devices and processes: meshes, rows over devices, several hosts."""
