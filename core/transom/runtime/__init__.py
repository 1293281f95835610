"""What happens after a model is compiled: generations, sampling, the engine that owns a session, the report."""
