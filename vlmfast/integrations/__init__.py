"""Other libraries' loops with vlmfast's losses: each module has `apply()` and `undo()`; an import does nothing."""
