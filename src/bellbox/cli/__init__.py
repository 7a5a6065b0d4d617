"""The command-line program: one file a command, each a thin layer over library calls."""
