"""Errors, files, ranks and logging: what every other package may stand on."""
