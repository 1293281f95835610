"""From `load()` to a session: the machine, the model's identity, attempts one after the other, remembered failures."""
