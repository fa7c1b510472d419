"""What programs show and read at the command line: flags, tables, progress, results."""
