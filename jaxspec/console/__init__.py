"""The command line of programs: flags and overrides that they read, tables, progress and results that they write."""
