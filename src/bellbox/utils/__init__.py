"""Tools that every part may need: whole files, YAML, progress, memory."""
