"""Devices and processes: meshes, rows spread over devices, several hosts."""
