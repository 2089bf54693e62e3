"""The commands of `elsa`, one module each, which elsa_command.py names and scripts/ call as well."""
