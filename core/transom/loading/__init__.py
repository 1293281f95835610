"""From `load()` to a session: the machine, the model's identity, attempts in order, remembered failures."""
