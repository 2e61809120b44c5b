"""What each command does, in the file of its name: a dataclass `Config`, whose fields are flags, and `run(config)`."""
